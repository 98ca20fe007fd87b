"""One training step of the library's trainer, plain or variance-reduced, on random tokens: operations, seconds, peak memory.

A step is the trainer's own loss, its backward pass, gradient clipping and AdamW, float32 on one thread. Completions have one
length, so nothing is padding, and share their prompt. Each function runs in a process of its own (`ru_maxrss` is one's peak).
"""

from __future__ import annotations

import resource
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from polyref import PreferenceConfig, PreferenceTrainer
from polyref.cli.settings import LoraSettings, peft_config
from polyref.data.collate import collate
from polyref.scoring.cache import LogProbCache, ScorerKey, row_key
from polyref.scoring.logprobs import ScoringPlan, completion_logps, probe
from polyref.training.dataset import PairCollator, ScoredPairs
from polyref.types import PreferenceRecord, TokenizedPair

CACHED_PAIRS = 256
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Case:
    """A Llama of random weights, and the steps it takes: B prompts a batch, all completions of one length, in tokens.

    `lora_layers`: a LoRA of rank 16 on so many of the last layers; 0 trains all weights. `every`: the M that take turns, 0
    (plain) first; `rounds`: counted steps of each.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    batch: int
    rounds: int
    prompt: int = 128
    completion: int = 64
    lora_layers: int = 0
    every: tuple[int, ...] = (0, 1, 2, 4, 8)

    @property
    def layer_parameters(self) -> int:
        """Weights of the matrices of one layer."""
        keys = self.hidden * self.key_value_heads // self.heads
        return 2 * self.hidden * (self.hidden + keys) + 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        """All weights; the output head is the embedding."""
        return self.layers * (self.layer_parameters + 2 * self.hidden) + self.hidden * (1 + self.vocabulary)


SMALLEST = Case("smallest", 16, 32, 1, 2, 2, 64, batch=1, rounds=1, prompt=4, completion=4)


def operations(case: Case, pairs: int) -> dict[str, float]:
    """Floating-point operations of a step with M = `pairs` auxiliary pairs (0: plain), and of scoring it once, modelled.

    With n = 2 + 2M completions of c tokens after a prompt of p: T = p + nc tokens a row, P weights in the matrices of a layer,
    H hidden units, V words, and a multiply-add counted as 2,

        forward(layer) = 2 P T + 4 H T^2        (attention is computed over the whole row, masked or not)
        backward(layer) = 4 P T + 10 H T^2      (with a LoRA, 2 P T + 10 H T^2, in its layers only)
        head = 8 V H nc, forward and backward   (2 V H nc when scoring, 4 with a frozen head)

    The optimiser and all that is elementwise is left out. `tokens` is T, what is left when attention and head are left out.
    """
    scored = (2 + 2 * pairs) * case.completion
    tokens = case.prompt + scored
    linear, attention = 2.0 * case.layer_parameters * tokens, 4.0 * case.hidden * tokens**2
    head = 2.0 * case.vocabulary * case.hidden * scored
    forward = case.layers * (linear + attention)
    if case.lora_layers:
        step = forward + case.lora_layers * (linear + 2.5 * attention) + 2 * head
    else:
        step = forward + case.layers * (2 * linear + 2.5 * attention) + 4 * head
    return {"tokens": float(tokens * case.batch), "step": step * case.batch, "score": (forward + head) * case.batch}


def alone(case: Case, pairs: int) -> dict[str, float]:
    """Operations of a step and of scoring it once, counted as they run, and the peak of a process that does nothing else.

    `held_mib` is what the process held before there was a model, `peak_mib` what it held at most; a step that scores the
    references holds their weights, `reference_mib`, besides.
    """
    with tempfile.TemporaryDirectory() as folder:
        prepare()
        counted_step(SMALLEST, 1, folder)  # what is loaded on first use is no part of training
        held = peak_mib()
        step = counted_step(case, pairs, folder)
        peak = peak_mib()
    reference = make_model(case, seed=1).eval()
    plan = probe(reference)
    weights = 4 * sum(p.numel() for p in reference.parameters()) / MIB
    with counter() as counted:
        score(reference, plan, case, pairs)
    values = {"held_mib": held, "peak_mib": peak, "reference_mib": weights}
    return values | {"step_operations": step, "score_operations": counted.get_total_flops()}


def in_turn(case: Case) -> dict[int, list[dict[str, float]]]:
    """`case.rounds` times, for each M in turn: seconds of scoring all completions by a reference, and of a step.

    One model and optimiser take all steps. `cache` is seconds of keeping as many scores and reading them back.
    """
    with tempfile.TemporaryDirectory() as folder:
        prepare()
        trainers = make_trainers(case, folder)
        begin_optimiser(trainers[False])
        trainers[True].optimizer = trainers[False].optimizer
        reference = make_model(case, seed=1).eval()
        batches = {pairs: make_batch(case, pairs) for pairs in case.every}
        take_step(trainers[False], batches[0])
        timings: dict[int, list[dict[str, float]]] = {pairs: [] for pairs in case.every}
        for _ in range(case.rounds):
            for pairs, batch in batches.items():
                start = time.perf_counter()
                score(reference, trainers[False].plan, case, pairs)
                scored = time.perf_counter()
                take_step(trainers[pairs > 0], batch)
                timings[pairs].append({"score": scored - start, "step": time.perf_counter() - scored})
        for pairs, rows in timings.items():
            cache = cache_seconds(case, pairs, folder) * case.batch
            for row in rows:
                row["cache"] = cache
    return timings


def prepare() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def make_model(case: Case, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.key_value_heads,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def make_trainers(case: Case, folder: str) -> tuple[PreferenceTrainer, PreferenceTrainer]:
    """Plain and variance-reduced, of one model."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>")
    model: Any = make_model(case, seed=0)
    lora = peft_config(LoraSettings(last_layers=case.lora_layers), model) if case.lora_layers else None
    common: dict[str, Any] = {"output_dir": folder, "use_cpu": True, "report_to": "none", "seed": 0}
    plain = PreferenceTrainer(model, None, PreferenceConfig(**common), processing_class=tokenizer, peft_config=lora)
    reduced_args = PreferenceConfig(**common, objective="variance_reduced")
    reduced = PreferenceTrainer(plain.model, None, reduced_args, processing_class=tokenizer)
    for trainer in (plain, reduced):
        trainer._start_check = None  # a random anchor is not the policy
        trainer.model.train()
    return plain, reduced


def begin_optimiser(trainer: PreferenceTrainer) -> None:
    """AdamW with its moments in memory, as from the second step on."""
    optimiser = trainer.create_optimizer()
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    optimiser.zero_grad()


def make_items(case: Case, pairs: int) -> list[TokenizedPair]:
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, case.vocabulary, (n,), generator=generator).tolist())

    completions = [[draw(case.completion) for _ in range(2 + 2 * pairs)] for _ in range(case.batch)]
    return [TokenizedPair(draw(case.prompt), c[0], c[1], auxiliary_ids=tuple(c[2:])) for c in completions]


def make_batch(case: Case, pairs: int) -> dict[str, torch.Tensor]:
    """B pairs with M auxiliary ones each, as the trainer's collator makes them; probabilities and anchors change no cost."""
    record = PreferenceRecord("x", "y", "z", predicted_probability=0.7, auxiliary_probability=(0.4,) * pairs)
    anchor = torch.zeros(case.batch, 2 + 2 * pairs)
    scored = ScoredPairs(make_items(case, pairs), [record] * case.batch, anchor)
    return PairCollator()(list(scored.pairs))


def counted_step(case: Case, pairs: int, folder: str) -> int:
    """Operations of one step, by a trainer made for it."""
    trainer = make_trainers(case, folder)[pairs > 0]
    begin_optimiser(trainer)
    batch = make_batch(case, pairs)
    with counter() as counted:
        take_step(trainer, batch)
    return counted.get_total_flops()


def take_step(trainer: PreferenceTrainer, batch: dict[str, torch.Tensor]) -> None:
    trainer.compute_loss(trainer.model, batch).backward()
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


@torch.no_grad()
def score(model: torch.nn.Module, plan: ScoringPlan, case: Case, pairs: int) -> None:
    """Score all completions of a batch by one reference, as they are scored on their way into the cache."""
    completion_logps(model, collate([(p.prompt_ids, p.completions) for p in make_items(case, pairs)]), plan)


def cache_seconds(case: Case, pairs: int, folder: str) -> float:
    """Seconds a pair of keeping its scores in a fresh cache of `CACHED_PAIRS` pairs, and of reading them back."""
    (item, *_) = make_items(case, pairs)
    scorer = ScorerKey(weights=f"random, M = {pairs}")
    start = time.perf_counter()
    cache = LogProbCache(folder)
    keys = [row_key((i, *item.prompt_ids), c) for i in range(CACHED_PAIRS) for c in item.completions]
    with cache.writer(scorer) as writer:
        writer.add(keys, [-1.0] * len(keys), [case.completion] * len(keys))
    if len(LogProbCache(folder).lookup(scorer, keys)) != len(keys):
        raise RuntimeError("the cache lost a score")
    return (time.perf_counter() - start) / CACHED_PAIRS


def counter() -> FlopCounterMode:
    """Counts matrix products and attention, also what PyTorch's own table lacks: the CPU's kernel and products in place."""

    def forward(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return int(sdpa_backward_flop_count(gradient, query, key, value))

    def in_place(total: Any, left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
        return 2 * int(left[0]) * int(left[1]) * int(right[1])

    aten = torch.ops.aten
    kernels = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        aten.addmm_: in_place,
    }
    return FlopCounterMode(display=False, custom_mapping=kernels)
