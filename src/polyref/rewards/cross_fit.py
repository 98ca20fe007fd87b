"""Cross-fitting: a preference model's probability of every pair, from a fit that saw neither that pair nor its prompt.

A model fitted on the labels that it then corrects is not independent of them, and the variance-reduced loss is no longer
unbiased. With K folds nothing is held back: each pair is predicted by a fit on the other K - 1 folds.
"""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyref.data.records import record_to_row
from polyref.data.sources import by_prompt, prompt_key
from polyref.errors import ConfigError, DataError
from polyref.files import write_bytes
from polyref.rewards.protocols import PreferenceModel, check_probabilities
from polyref.stages import RunFolder, content_digest
from polyref.types import PreferenceRecord, Text

logger = logging.getLogger(__name__)

Fit = Callable[[list[PreferenceRecord], int], PreferenceModel]
"""Called as fit(records of the other folds, number of the fold left out); the same records must give the same model."""


class Comparison(NamedTuple):
    """Two completions of a prompt, whose probability that `first` is preferred is asked for."""

    prompt: Text
    first: Text
    second: Text


class CrossFitted(NamedTuple):
    """`probability` (P,) float64: g of each pair, and `fold` (P,) int64: which fold's model, fitted without it, says so."""

    probability: Tensor
    fold: Tensor


def cross_fit(
    records: Sequence[PreferenceRecord],
    fit: Fit,
    *,
    folds: int = 5,
    seed: int,
    pairs: Sequence[Comparison] | None = None,
    folder: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> CrossFitted:
    """g of each of `pairs` by the model of `folds` that saw no pair of its prompt; by default each record's (chosen, rejected).

    `pairs` may hold auxiliary pairs, of prompts in `records` or not. Folds are those of `prompt_folds`, which depend on the
    prompts and `seed` alone. One model is in memory at a time. With a `folder`, a run folder, each fold's probabilities are
    kept when they are there: a killed call, made again, fits only the folds that are missing. `settings` must then say what
    `fit` depends on (model, learning rate, its seed), since a function cannot be compared with that of an earlier call.
    Errors: those of `prompt_folds`; `ConfigError` for a folder without settings; `ModelError` where a model gives no
    probability; `RunFolderError` where the folder holds the work of other records, pairs, folds, seed or settings.
    """
    if folder is not None and not settings:
        what = "a folder is given without settings, and a function cannot be compared with that of an earlier call"
        raise ConfigError(what, where="cross_fit", fix="name in settings what fit depends on, as {'lr': 2e-5}")
    asked = [Comparison(r.prompt, r.chosen, r.rejected) for r in records] if pairs is None else list(pairs)
    of_prompt = prompt_folds(records, [pair.prompt for pair in asked], folds=folds, seed=seed)
    fold = torch.tensor([of_prompt[prompt_key(pair.prompt)] for pair in asked], dtype=torch.long)
    probability = torch.full((len(asked),), torch.nan, dtype=torch.float64)

    def predicted(number: int) -> Tensor:
        others = [r for r in records if of_prompt[prompt_key(r.prompt)] != number]
        logger.info("fold %d: fitted on %d pairs, asked about %d", number, len(others), len(rows_of[number]))
        model = fit(others, number)
        prompts, first, second = zip(*(asked[i] for i in rows_of[number]), strict=True)
        return check_probabilities(model(prompts, first, second), len(prompts), f"{model.name}, fold {number}")

    rows_of = {number: (fold == number).nonzero()[:, 0].tolist() for number in range(folds)}
    config = {
        "records": content_digest([_keyed(record_to_row(record)) for record in records]),
        "pairs": content_digest([_keyed(pair._asdict()) for pair in asked]),
        "folds": folds,
        "seed": seed,
        "settings": dict(settings or {}),
    }
    with RunFolder(folder, config, seeds={"seed": seed}) if folder is not None else nullcontext() as run:
        for number, rows in rows_of.items():
            if rows:
                probability[rows] = predicted(number) if run is None else _kept(run, number, predicted)
    return CrossFitted(probability, fold)


def prompt_folds(records: Sequence[PreferenceRecord], prompts: Sequence[Text] = (), *, folds: int, seed: int) -> dict[str, int]:
    """The fold 0..folds-1 of every prompt, by its `prompt_key`: all pairs of a prompt are in one.

    The prompts of `records`, in random order, each go to the fold that has the fewest pairs so far; the other `prompts` then
    go round the folds. Equal prompts alone are kept together: near-copies of one are better removed before. ConfigError for
    fewer than 2 folds, DataError for fewer prompts with records than folds.
    """
    if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
        raise ConfigError(f"folds is {folds!r}", where="cross_fit", fix="give a whole number, at least 2")
    sizes = {prompt: len(group) for prompt, group in by_prompt(records).items()}
    if len(sizes) < folds:
        fix = "give data with more prompts, or fewer folds"
        raise DataError(f"{len(sizes)} prompts cannot be split into {folds} folds", where="cross_fit", fix=fix)
    found: dict[str, int] = {}
    filled = Counter({number: 0 for number in range(folds)})
    for prompt in _shuffled(sizes, seed):
        found[prompt] = min(filled, key=lambda number: (filled[number], number))
        filled[found[prompt]] += sizes[prompt]
    others = {prompt_key(prompt): 0 for prompt in prompts if prompt_key(prompt) not in sizes}
    return found | {prompt: index % folds for index, prompt in enumerate(_shuffled(others, seed))}


def _keyed(row: Mapping[str, Any]) -> dict[str, Any]:
    """`row` with texts by their `prompt_key`, as folds are: messages in a list or a tuple are the same ones."""
    texts = {"prompt", "chosen", "rejected", *Comparison._fields}
    return {name: prompt_key(value) if name in texts else value for name, value in row.items()}


def _shuffled(prompts: Mapping[str, int], seed: int) -> list[str]:
    order = sorted(prompts)
    random.Random(seed).shuffle(order)
    return order


def _kept(run: RunFolder, number: int, predicted: Callable[[int], Tensor]) -> Tensor:
    """The probabilities of a fold, from the folder when they are there."""
    stage = run.stage(f"fold-{number}")
    file = stage.folder / "probabilities.json"
    if not stage.done:
        write_bytes(file, (json.dumps(predicted(number).tolist()) + "\n").encode())
        stage.finish([file])
    return torch.tensor(json.loads(file.read_text()), dtype=torch.float64)
