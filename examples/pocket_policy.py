"""A pocket policy: a Llama of about one million parameters, trained from nothing in minutes on one thread.

Studies need a starting policy and references that really differ, small enough to train, score and sample many times a day:

    python examples/pocket_policy.py --output_dir runs/pocket

writes three folders that `AutoModelForCausalLM` and `AutoTokenizer` load, each with its losses in `metrics.json`:

    base      every token of plain conversations: hh-harmless-base and pandalm-human (the chosen AND the rejected replies, so it
              knows of no preference) and gsm8k. The starting policy.
    harmless  base, then SFT on the replies of hh-harmless-base that people chose.
    helpful   base, then SFT on the replies of pandalm-human and mt-bench-human that people chose.

Base has already read the replies of hh, so harmless narrows it rather than betters it there; helpful moves away from hh and
gains on new kinds of prompts. `metrics.json` tells how far.

Nothing here, the tokenizer included, sees a held-out prompt: `split_by_prompt` splits each set with the sizes of SOURCES and
SPLIT_SEED, so that a study which splits likewise evaluates on prompts new to all three. The same settings on the same machine
give the same weights; a run that was interrupted goes on with the first folder that is missing.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from math import log
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from polyref.data.sources import load_preferences, split_by_prompt
from polyref.data.tokenize import tokenize_records
from polyref.files import atomic_write, file_digest
from polyref.stages import RunFolder
from polyref.types import PreferenceRecord


class Source(NamedTuple):
    """A set: its file, the form of its prompts, the rows (or the share of them) held out, and at most how many are used."""

    file: str
    prompt_format: str
    held_out: int | float
    train_rows: int | None = None


SPLIT_SEED = 0
SOURCES = {
    "hh-harmless-base": Source("pairs.jsonl.gz", "transcript", 300),
    "pandalm-human": Source("pairs.jsonl.gz", "chat", 0.2),
    "mt-bench-human": Source("pairs.jsonl.gz", "chat", 0.2),
    "gsm8k": Source("train.jsonl.gz", "chat", 0.05, train_rows=2000),
}
POLICIES = {  # the sets, the replies of them, and the share of the training time
    "base": (("hh-harmless-base", "pandalm-human", "gsm8k"), ("chosen", "rejected"), 0.8),
    "harmless": (("hh-harmless-base",), ("chosen",), 0.1),
    "helpful": (("pandalm-human", "mt-bench-human"), ("chosen",), 0.1),
}
CONTEXT = 512
BATCH_TOKENS = 512
TOKENS_PER_SECOND = 7000  # measured on one thread; turns --minutes into a token budget, so that a busy machine trains the same
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTIONS = ("How do I pick a lock?", "Name three fruits.", "Tom has 3 apples and buys 5 more. How many apples has he?")
Corpora = dict[str, tuple[list[PreferenceRecord], list[PreferenceRecord]]]


class Sample(NamedTuple):
    """One conversation: the ids of prompt and reply; the reply begins at position `reply`."""

    ids: tuple[int, ...]
    reply: int


def build_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `texts` with a ChatML template; eos is the end of a turn, so that replies end."""
    pad, bos, start, eos = special = ["<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", [(bos, special.index(bos))])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=[start],
        chat_template=TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, *, hidden_size: int = 128, layers: int = 4) -> LlamaForCausalLM:
    """An untrained Llama with tied embeddings for `tokenizer`; its weights come from torch's global generator."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def load_corpora(data: Path) -> Corpora:
    """(train, held out) of every set. A training row that opens with the user turn of a held-out one is left out: hh holds
    several conversations at two lengths, and the longer one would show a reply to the held-out shorter one."""
    corpora = {}
    for name, source in SOURCES.items():
        path = data / name / source.file
        rows = read_solutions(path) if name == "gsm8k" else path
        records = load_preferences(rows, prompt_format=source.prompt_format)
        train, held_out = split_by_prompt(records, held_out=source.held_out, seed=SPLIT_SEED)
        openings = {record.prompt[0]["content"] for record in held_out}
        train = [record for record in train if record.prompt[0]["content"] not in openings]
        corpora[name] = train[: source.train_rows], held_out
    return corpora


def read_solutions(path: Path) -> list[dict[str, str]]:
    """The rows of gsm8k without the calculator marks; the rejected reply is empty, and so left out by `make_samples`."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = map(json.loads, file)
        return [{"prompt": r["prompt"], "chosen": re.sub(r"<<.*?>>", "", r["solution"]), "rejected": ""} for r in rows]


def turns(records: Iterable[PreferenceRecord]) -> Iterator[str]:
    """Every turn as the template writes it, for the tokenizer."""
    for record in records:
        for message in (*record.prompt, *record.chosen, *record.rejected):
            yield f"{message['role']}\n{message['content']}"


def make_samples(
    records: Sequence[PreferenceRecord], tokenizer: PreTrainedTokenizerFast, replies: Sequence[str] = ("chosen", "rejected")
) -> list[Sample]:
    """The distinct conversations of `records`, cut to the context; empty replies are left out."""
    tokenized = tokenize_records(records, tokenizer, max_length=CONTEXT)
    samples = (
        Sample(pair.prompt_ids + getattr(pair, f"{reply}_ids"), len(pair.prompt_ids))
        for record, pair in zip(tokenized.records, tokenized.pairs, strict=True)
        for reply in replies
        if getattr(record, reply)[0]["content"].strip()
    )
    return list(dict.fromkeys(samples))


def batches(samples: Sequence[Sample], rng: random.Random) -> list[list[Sample]]:
    """`samples` once, in random batches of like lengths that fill at most BATCH_TOKENS with padding."""
    groups: list[list[Sample]] = [[]]
    for sample in sorted(rng.sample(samples, len(samples)), key=lambda sample: len(sample.ids) // 16):
        width = max(len(other.ids) for other in (*groups[-1], sample))
        if groups[-1] and width * (len(groups[-1]) + 1) > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(sample)
    rng.shuffle(groups)
    return groups


def summed_loss(model: LlamaForCausalLM, batch: Sequence[Sample], *, whole: bool = False) -> tuple[torch.Tensor, int]:
    """Summed negative log-likelihood (nats) of the reply tokens of `batch`, or of the `whole` conversations; their count.

    Rows are padded on the right, where causal attention never looks: no mask is needed."""
    width = max(len(sample.ids) for sample in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    targets = torch.full((len(batch), width), -100)
    for row, (tokens, reply) in enumerate(batch):
        first = 1 if whole else reply
        ids[row, : len(tokens)] = torch.tensor(tokens)
        targets[row, first : len(tokens)] = torch.tensor(tokens[first:])
    logits, targets = model(input_ids=ids, use_cache=False).logits[:, :-1], targets[:, 1:]
    loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return loss, int((targets >= 0).sum())


def train_sft(
    model: LlamaForCausalLM,
    samples: Sequence[Sample],
    *,
    tokens: int,
    seed: int,
    learning_rate: float = 3e-3,
    whole: bool = False,
    steps: int | None = None,
) -> dict[str, float]:
    """Train `model` in place by AdamW on replies (or `whole` conversations) until `tokens` tokens, or `steps`, have been seen.

    Returns the mean loss (nats a token) over the last tenth of the run, steps, tokens, epochs and tokens a second."""
    rng, start = random.Random(seed), time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    model.train()
    seen, progress, queue = 0, 0.0, []
    losses: list[tuple[float, int]] = []
    while progress < 1:
        queue = queue or batches(samples, rng)
        batch = queue.pop()
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, progress / 0.03 + 0.01) * (1 - progress)
        loss, count = summed_loss(model, batch, whole=whole)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((loss.item(), count))
        seen += sum(len(sample.ids) for sample in batch)
        done = len(losses) / steps if steps else seen / tokens
        if int(10 * done) > int(10 * progress):
            rate = seen / (time.perf_counter() - start)
            print(f"  {done:4.0%}  loss {loss.item() / count:.3f} nats a token  {rate:,.0f} tokens a second", flush=True)
        progress = done
    total, counted = map(sum, zip(*losses[-max(1, len(losses) // 10) :], strict=True))
    epochs, rate = seen / sum(len(sample.ids) for sample in samples), seen / (time.perf_counter() - start)
    return {"train_loss": total / counted, "steps": len(losses), "tokens": seen, "epochs": epochs, "tokens_per_second": rate}


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, held_out: Sequence[Sample], train: Sequence[Sample]) -> dict[str, float]:
    """Nats a reply token of `model`, and of the guess that knows only how often each token occurs in the replies of `train`."""
    model.eval()
    losses, counts = zip(*(summed_loss(model, batch) for batch in batches(held_out, random.Random(0))), strict=True)
    seen = Counter(token for sample in train for token in sample.ids[sample.reply :])
    total = seen.total() + model.config.vocab_size
    guesses = [log(total / (seen[token] + 1)) for sample in held_out for token in sample.ids[sample.reply :]]
    return {"loss": float(sum(losses)) / sum(counts), "unigram": sum(guesses) / len(guesses)}


@torch.no_grad()
def sample_replies(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> dict[str, str]:
    """One sampled reply to each of QUESTIONS (temperature 0.7)."""
    torch.manual_seed(seed)
    model.eval()
    replies = {}
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**inputs, max_new_tokens=48, do_sample=True, temperature=0.7, top_p=0.95)
        replies[question] = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return replies


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the pocket policy and its two references.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--minutes", type=float, default=8.0, help="training time in all, at TOKENS_PER_SECOND")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order; the split does not depend on it")
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--steps", type=int, help="train each model for so many steps instead: a smoke test")
    settings = parser.parse_args(arguments)
    torch.set_num_threads(1)

    config = {name: value for name, value in vars(settings).items() if name not in ("output_dir", "data")}
    with RunFolder(settings.output_dir, config, seeds={"train": settings.seed, "split": SPLIT_SEED}) as run:
        corpora = load_corpora(settings.data)
        inputs = {name: file_digest(settings.data / name / source.file) for name, source in SOURCES.items()}
        inputs["code"] = file_digest(__file__)
        for name in POLICIES:
            stage = run.stage(name, inputs)
            if stage.done:
                print(f"{name}: already in {run.path / name}")
            else:
                with atomic_write(run.path / name) as folder:
                    metrics = make_policy(name, run.path / "base", folder, corpora, settings)
                stage.finish([run.path / name], metrics)
            if name == "base":
                inputs |= stage.outputs


def make_policy(name: str, base: Path, folder: Path, corpora: Corpora, settings: argparse.Namespace) -> dict[str, object]:
    """Train policy `name` (from the one in `base`, unless it is that) and write it into `folder`; returns its metrics."""
    torch.manual_seed(settings.seed)
    sets, replies, share = POLICIES[name]
    few = 8 if settings.steps else None
    records = [record for key in sets for record in corpora[key][0][:few]]
    new = name == "base"
    tokenizer = build_tokenizer(turns(records), settings.vocab_size) if new else PreTrainedTokenizerFast.from_pretrained(base)
    model = build_model(tokenizer) if new else LlamaForCausalLM.from_pretrained(base)
    train = make_samples(records, tokenizer, replies)
    metrics: dict[str, object] = {"parameters": model.num_parameters(), "vocabulary": len(tokenizer), "samples": len(train)}
    print(name, metrics, flush=True)
    tokens, rate = int(share * settings.minutes * 60 * TOKENS_PER_SECOND), 3e-3 if new else 3e-4
    metrics |= train_sft(model, train, tokens=tokens, seed=settings.seed, learning_rate=rate, whole=new, steps=settings.steps)
    for key, (_, held_out) in corpora.items():
        for side in ("chosen", "rejected"):
            if samples := make_samples(held_out[: few or 300], tokenizer, (side,)):
                metrics[f"held_out/{key}/{side}"] = evaluate(model, samples, train)
    metrics["replies"] = sample_replies(model, tokenizer, settings.seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = json.dumps(metrics, indent=2, ensure_ascii=False)
    (folder / "metrics.json").write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)
    return metrics


if __name__ == "__main__":
    main()
