"""Prompts, completions and labels of benchmarks/robust_study.py: drawn by the starting policy, labelled by a corrupted gold."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from robust_gold import GoldReward
from scipy.special import expit

from polyref.data.sources import by_prompt, load_preferences, split_by_prompt
from polyref.files import write_bytes
from polyref.samplers.engine import SamplingParameters
from polyref.samplers.local import LocalEngine
from polyref.types import PreferenceRecord, Text

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from pocket_policy import SOURCES, SPLIT_SEED

PAIRS = 5
"""Of a prompt: the data pair and M = 4 auxiliary ones."""

SPREAD, DIRECTIONS = 4.0, 3
"""Of gold: the standard deviation of its difference in a pair, in nats (how sure clean labels are), and of its inputs."""

Floats = NDArray[np.float64]


class Pool(NamedTuple):
    """P prompts with PAIRS pairs of completions each, texts [P][PAIRS][2]; gold rewards and lengths are (P, PAIRS, 2)."""

    prompts: list[Text]
    texts: list[list[list[str]]]
    gold: Floats
    lengths: Floats


def human_splits(data: Path) -> tuple[list[PreferenceRecord], list[Text], list[Text]]:
    """Human pairs that fit the gold, prompts to train on, prompts to evaluate on: disjoint; no model has seen the last."""
    hh = load_preferences(data / "hh-harmless-base" / "pairs.jsonl.gz", prompt_format="transcript")
    pandalm = load_preferences(data / "pandalm-human" / "pairs.jsonl.gz", prompt_format="chat")
    train, held_out = split_by_prompt(hh, held_out=SOURCES["hh-harmless-base"].held_out, seed=SPLIT_SEED)
    others, _ = split_by_prompt(pandalm, held_out=SOURCES["pandalm-human"].held_out, seed=SPLIT_SEED)
    study, for_gold = split_by_prompt(train, held_out=500, seed=1)
    return for_gold + others, _prompts(study), _prompts(held_out)


def _prompts(records: Sequence[PreferenceRecord]) -> list[Text]:
    return [group[0].prompt for group in by_prompt(records).values()]


def message(text: str) -> Text:
    """A completion as the data of conversations has it."""
    return ({"role": "assistant", "content": text},)


def draw_pool(
    engine: LocalEngine, prompts: Sequence[Text], limit: int, candidates: int, parameters: SamplingParameters
) -> Pool:
    """The first `limit` prompts that have PAIRS acceptable pairs among the candidates drawn.

    A pair is acceptable if both completions ended and differ: keeping the first such pairs is an exact draw from the policy's
    law given that. A prompt with too few of them is left out. Gold is still 0.
    """
    kept: list[Text] = []
    texts: list[list[list[str]]] = []
    lengths: list[list[list[float]]] = []
    for start in range(0, len(prompts), 20):
        some = prompts[start : start + 20]
        for prompt, row in zip(some, engine(some, candidates, parameters, seed=1), strict=True):
            pairs = [(a, b) for a, b in zip(row[::2], row[1::2], strict=True) if a.ended and b.ended and a.text != b.text]
            if len(pairs) >= PAIRS and len(kept) < limit and all(c.text.strip() for pair in pairs[:PAIRS] for c in pair):
                kept.append(prompt)
                texts.append([[a.text, b.text] for a, b in pairs[:PAIRS]])
                lengths.append([[float(len(a.token_ids)), float(len(b.token_ids))] for a, b in pairs[:PAIRS]])
        print(f"pool: {len(kept)} prompts of {limit}", flush=True)
        if len(kept) == limit:
            break
    return Pool(kept, texts, np.zeros((len(kept), PAIRS, 2)), np.array(lengths))


def with_gold(pool: Pool, gold: GoldReward, human: Floats) -> Pool:
    """`pool` with the rewards of `gold`, which is fitted on the `human` differences and scaled to SPREAD.

    It reads the DIRECTIONS first principal components of the completions of a prompt about their mean.
    """
    flat = [message(text) for pairs in pool.texts for pair in pairs for text in pair]
    prompts = [prompt for prompt in pool.prompts for _ in range(2 * PAIRS)]
    features = gold.features(prompts, flat).reshape(len(pool.prompts), 2 * PAIRS, -1)
    centred = (features - features.mean(1, keepdims=True)).reshape(len(flat), -1)
    gold.fit(human, np.linalg.svd(centred, full_matrices=False)[2][:DIRECTIONS].T)
    rewards = (features @ gold.weights).reshape(-1, PAIRS, 2)
    scale = SPREAD / (rewards[..., 0] - rewards[..., 1]).std()
    gold.weights = gold.weights * scale
    return pool._replace(gold=rewards * scale)


def save_pool(pool: Pool, path: Path) -> None:
    content = {"prompts": pool.prompts, "texts": pool.texts, "gold": pool.gold.tolist(), "lengths": pool.lengths.tolist()}
    write_bytes(path, json.dumps(content).encode())


def as_prompts(found: Sequence[Any]) -> list[Text]:
    """Prompts as JSON gives them back, which knows lists but no tuples."""
    return [prompt if isinstance(prompt, str) else tuple(prompt) for prompt in found]


def load_pool(path: Path) -> Pool:
    found = json.loads(path.read_text())
    return Pool(as_prompts(found["prompts"]), found["texts"], np.array(found["gold"]), np.array(found["lengths"]))


def clean(pool: Pool) -> Floats:
    """P(first preferred) by gold (P, PAIRS)."""
    return np.asarray(expit(pool.gold[..., 0] - pool.gold[..., 1]))


def lapses(rate: float) -> Callable[[Pool], Floats]:
    """With probability `rate` the annotator tosses a coin."""
    return lambda pool: (1 - rate) * clean(pool) + rate / 2


def intransitive(pool: Pool) -> Floats:
    """Short, middling and long completions of the pool beat each other in a circle, by 2 nats, on top of gold."""
    kind = np.digitize(pool.lengths, np.quantile(pool.lengths, [1 / 3, 2 / 3]))
    turn = (kind[..., 1] - kind[..., 0] + 1) % 3 - 1  # +1 where the first beats the second in the circle
    return np.asarray(expit(pool.gold[..., 0] - pool.gold[..., 1] + 2.0 * turn))


def length_biased(pool: Pool) -> Floats:
    """A nat for each standard deviation by which the first is longer."""
    longer = (pool.lengths[..., 0] - pool.lengths[..., 1]) / pool.lengths.std()
    return np.asarray(expit(pool.gold[..., 0] - pool.gold[..., 1] + longer))


CORRUPTIONS: Mapping[str, Callable[[Pool], Floats]] = {
    "clean": clean,
    "lapses 20%": lapses(0.2),
    "lapses 40%": lapses(0.4),
    "intransitive": intransitive,
    "length-biased": length_biased,
}
"""P(first preferred) as the annotators give it, (P, PAIRS): what the true g of a corruption is."""


def labelled(pool: Pool, corruption: str, seed: int) -> list[PreferenceRecord]:
    """The data pair of each prompt, in the order of its label: z drawn from the corrupted probability."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.rand(len(pool.prompts), generator=generator, dtype=torch.float64).numpy() < CORRUPTIONS[corruption](pool)[:, 0]
    rows = zip(pool.prompts, pool.texts, z.tolist(), strict=True)
    return [
        PreferenceRecord(prompt, *map(message, pairs[0] if first else pairs[0][::-1]), source="robust_study", row=number)
        for number, (prompt, pairs, first) in enumerate(rows, 1)
    ]
