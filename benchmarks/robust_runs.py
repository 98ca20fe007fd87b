"""One run of benchmarks/robust_study.py: an auxiliary model, or a policy trained on labels and judged by the gold."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import torch
from robust_auxiliary import RIDGES, TokenCountReward
from robust_data import CORRUPTIONS, DIRECTIONS, PAIRS, SPREAD, Floats, Pool, as_prompts, labelled, load_pool, message
from robust_gold import RIDGE, GoldReward
from transformers import logging as transformers_logging

from polyref import PreferenceConfig, PreferenceTrainer, Reference
from polyref.cli.settings import LoraSettings, peft_config
from polyref.data.collate import collate
from polyref.files import write_bytes
from polyref.rewards.auxiliary_columns import with_auxiliary
from polyref.rewards.cross_fit import Comparison, cross_fit
from polyref.rewards.preference_model import from_reward
from polyref.rewards.protocols import PreferenceModel
from polyref.samplers.engine import SamplingParameters
from polyref.samplers.local import LocalEngine
from polyref.scoring.logprobs import completion_logps, probe
from polyref.scoring.models import ModelSource, load_causal_lm, load_tokenizer
from polyref.types import PreferenceRecord

FOLDS, DRAWS = 5, 2
FLIPS: Mapping[str, float] = {"lapses 40%": 0.2}
"""The flip rate that `smoothed` and `robust` are told: the true one under lapses, 0.1 elsewhere."""
RSO_BETA = 0.5
"""Of the rejection: accept with exp((r - r_max)/RSO_BETA), r the calibrated reward in nats [RSO]."""
ARMS: Final[Mapping[str, Mapping[str, Any]]] = {
    "sigmoid": {},
    "ipo": {"loss_type": "ipo"},
    "smoothed": {"loss_type": "smoothed"},
    "robust": {"loss_type": "robust"},
    "Dr-DPO": {"dr_beta": 2.0},
    "hinge": {"loss_type": "hinge"},
    "RSO-style hinge": {"loss_type": "hinge"},
    "variance-reduced": {"objective": "variance_reduced"},
    "variance-reduced, estimated c": {"objective": "variance_reduced", "control_coefficient": "estimated"},
    "doubly robust": {"objective": "doubly_robust"},
    "variance-reduced, true g": {"objective": "variance_reduced"},
}
"""Arm -> its settings. The last is told the probability that labels are drawn from: no user has it, it bounds what g buys."""


@dataclass(frozen=True)
class Tier:
    """What runs share. `candidates`: completions drawn of a prompt; `lora_layers`: a LoRA on so many last layers is trained."""

    policy: str
    backbone: str
    gold: str
    folder: str
    epochs: float
    learning_rate: float
    batch_size: int
    max_new_tokens: int
    candidates: int
    beta: float = 0.1
    lora_layers: int | None = None

    def settings(self) -> dict[str, Any]:
        """Everything that outcomes depend on, but the names of folders."""
        own = {name: value for name, value in vars(self).items() if name not in ("policy", "backbone", "gold", "folder")}
        constants = {"pairs_a_prompt": PAIRS, "gold_spread": SPREAD, "gold_directions": DIRECTIONS, "gold_ridge": RIDGE}
        arms = {"rso_beta": RSO_BETA, "flips": {**FLIPS, "otherwise": 0.1}, "g_folds": FOLDS, "g_ridges": list(RIDGES)}
        return own | constants | arms | {"draws_judged": DRAWS, "arms": {arm: dict(given) for arm, given in ARMS.items()}}

    def file(self, kind: str, *names: object) -> Path:
        """Where the outcome of a run is kept."""
        return Path(self.folder) / kind / ("-".join(str(name).replace(" ", "_").replace("%", "") for name in names) + ".json")


def fit_auxiliary(tier: Tier, corruption: str, seed: int) -> None:
    """The reward of every completion, in nats, from a model that saw neither its prompt nor its label; g = s(difference)."""
    _quiet()
    pool = load_pool(Path(tier.folder) / "pool.json")
    records = labelled(pool, corruption, seed)
    texts = [[message(text) for pair in pairs for text in pair] for pairs in pool.texts]
    asked = [Comparison(p, row[i], row[0]) for p, row in zip(pool.prompts, texts, strict=True) for i in range(1, 2 * PAIRS)]
    start = time.perf_counter()
    tokenizer = load_tokenizer(ModelSource(tier.backbone))

    def fit(others: list[PreferenceRecord], fold: int) -> PreferenceModel:
        return from_reward(TokenCountReward(tokenizer, others, seed + fold))

    found = cross_fit(records, fit, folds=FOLDS, seed=seed, pairs=asked)
    odds = torch.special.logit(found.probability.clamp(1e-12, 1 - 1e-12)).numpy().reshape(-1, 2 * PAIRS - 1)
    rewards = np.concatenate([np.zeros((len(odds), 1)), odds], 1).reshape(-1, PAIRS, 2)
    content = {"rewards": rewards.tolist(), "seconds": time.perf_counter() - start}
    write_bytes(tier.file("auxiliary", corruption, seed), json.dumps(content).encode())


def train_policy(tier: Tier, arm: str, corruption: str, seed: int) -> None:
    """Train one arm, draw from it on the held-out prompts, and keep what the gold says of that."""
    _quiet()
    pool = load_pool(Path(tier.folder) / "pool.json")
    records = training_records(tier, pool, arm, corruption, seed)
    settings = dict(ARMS[arm])
    if settings.get("loss_type") in ("smoothed", "robust"):
        settings["label_smoothing"] = FLIPS.get(corruption, 0.1)
    start = time.perf_counter()
    with TemporaryDirectory() as folder:
        config = PreferenceConfig(
            output_dir=folder,
            beta=tier.beta,
            num_train_epochs=tier.epochs,
            learning_rate=tier.learning_rate,
            per_device_train_batch_size=tier.batch_size,
            max_length=512,
            warmup_steps=10,
            cache_dir=str(Path(tier.folder) / "cache"),
            seed=seed,
            **settings,
            **_common(),
        )
        mu = Reference(tier.policy) if settings.get("objective") == "doubly_robust" else None
        policy, tokenizer = load_causal_lm(ModelSource(tier.policy)), load_tokenizer(ModelSource(tier.policy))
        lora = peft_config(LoraSettings(last_layers=tier.lora_layers) if tier.lora_layers else None, policy)
        given: dict[str, Any] = {"processing_class": tokenizer, "peft_config": lora, "sampling_policy": mu}
        trainer = PreferenceTrainer(policy, Reference(tier.policy), config, records, **given)
        trainer.train()
    seconds = time.perf_counter() - start
    logs = {
        name: float(np.mean([line[name] for line in trainer.state.log_history if name in line]))
        for name in ("loss", "rewards/margins", "vr/factor", "dr/clip_share", "dr/ess", "dr/weight")
        if any(name in line for line in trainer.state.log_history)
    }
    content = judged(tier, trainer.model, seed) | {"train_seconds": seconds, "logs": logs}
    write_bytes(tier.file("policy", arm, corruption, seed), json.dumps(content).encode())


def judge_start(tier: Tier, seed: int) -> None:
    """What the gold says of the starting policy, on the random numbers of that seed."""
    _quiet()
    content = judged(tier, load_causal_lm(ModelSource(tier.policy)), seed)
    write_bytes(tier.file("start", seed), json.dumps(content).encode())


def training_records(tier: Tier, pool: Pool, arm: str, corruption: str, seed: int) -> list[PreferenceRecord]:
    """The labelled pairs, with what the arm needs beside them."""
    records = labelled(pool, corruption, seed)
    if ARMS[arm].get("objective") is None and not arm.startswith("RSO"):
        return records
    if arm.endswith("true g"):
        g = CORRUPTIONS[corruption](pool)
    else:
        found = json.loads(tier.file("auxiliary", corruption, seed).read_text())
        rewards = np.array(found["rewards"])
        if arm.startswith("RSO"):
            return _rejection_sampled(pool, rewards, seed)
        g = 1 / (1 + np.exp(rewards[..., 1] - rewards[..., 0]))
    return _with_g(records, pool, g)


def _with_g(records: Sequence[PreferenceRecord], pool: Pool, g: Floats) -> list[PreferenceRecord]:
    auxiliary = [[(message(a), message(b)) for a, b in pairs[1:]] for pairs in pool.texts]
    own = g.copy()
    for row, (record, pairs) in enumerate(zip(records, pool.texts, strict=True)):
        if record.chosen != message(pairs[0][0]):
            own[row, 0] = 1 - own[row, 0]
    return with_auxiliary(records, auxiliary, torch.from_numpy(own.reshape(-1)))


def _rejection_sampled(pool: Pool, rewards: Floats, seed: int) -> list[PreferenceRecord]:
    """RSO on the completions at hand: rejection by the learnt reward, two of those accepted, labelled by that reward."""
    generator, found = np.random.default_rng(seed), []
    for number, (prompt, pairs, r) in enumerate(
        zip(pool.prompts, pool.texts, rewards.reshape(len(rewards), -1), strict=True), 1
    ):
        texts = [text for pair in pairs for text in pair]
        accepted = np.flatnonzero(generator.random(len(r)) < np.exp((r - r.max()) / RSO_BETA)).tolist()
        others = [i for i in np.argsort(-r).tolist() if i not in accepted]
        first, second = (generator.permutation(accepted).tolist() + others)[:2]
        chosen, rejected = (first, second) if r[first] >= r[second] else (second, first)
        found.append(PreferenceRecord(prompt, message(texts[chosen]), message(texts[rejected]), source="rso", row=number))
    return found


def judged(tier: Tier, model: Any, seed: int) -> dict[str, Any]:
    """Gold, log pi/reference in nats and length of DRAWS completions of each held-out prompt, all (P, DRAWS)."""
    tokenizer = load_tokenizer(ModelSource(tier.policy))
    prompts = as_prompts(json.loads((Path(tier.folder) / "held_out.json").read_text()))
    engine = LocalEngine(model, tokenizer, batch_size=64)
    start = time.perf_counter()
    drawn = engine(prompts, DRAWS, SamplingParameters(tier.max_new_tokens), seed=1000 + seed)
    gold = GoldReward(tier.gold)
    gold.weights = np.array(json.loads((Path(tier.folder) / "gold.json").read_text())["weights"])
    texts = [message(completion.text) for row in drawn for completion in row]
    rewards = gold([prompt for prompt in prompts for _ in range(DRAWS)], texts).view(-1, DRAWS)
    reference = load_causal_lm(ModelSource(tier.policy)).eval()
    plan = probe(reference)
    ratios = []
    with torch.inference_mode():
        for prompt, row in zip(prompts, drawn, strict=True):
            batch = collate([(engine.prompt_ids(prompt), [c.token_ids for c in row])], layout=plan.layout)
            own = completion_logps(reference, batch, plan).total.view(-1).tolist()
            ratios.append([c.logp - logp for c, logp in zip(row, own, strict=True)])
    return {
        "gold": rewards.tolist(),
        "log_ratio": ratios,
        "tokens": [[len(c.token_ids) for c in row] for row in drawn],
        "judge_seconds": time.perf_counter() - start,
    }


def _common() -> dict[str, Any]:
    return {"use_cpu": True, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_steps": 10}


def _quiet() -> None:
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("polyref").setLevel(logging.ERROR)
