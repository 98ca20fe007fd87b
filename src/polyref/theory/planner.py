"""How many preference pairs a target gap needs: by the bounds of `polyref.theory.bounds`, and as the lab measured it.

The measured constant m makes gap = m d C/(beta n) hold for a stated share of the lab's runs, with d the number of free reward
parameters of a table and C the coverage of the optimum by the law of the pairs: the same form as the bound, with what really
happens in place of what cannot be excluded. It is read from `measured.json`, which `polyref lab reverse-gap --constants FILE`
writes. The lab measures problems of one size; what the same formula says of another is called extrapolated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Literal

import numpy as np

from polyref.errors import ConfigError
from polyref.theory.bounds import (
    MOST_PAIRS,
    class_error,
    linear_error,
    mixture_coverage,
    pairs_needed,
    reverse_gap_bound,
    table_error,
    transfer_bound,
)
from polyref.theory.regression import Numbers, estimates, quantile
from polyref.theory.results import ExperimentResult, Measured, rounded, to_dict

SOURCES: Mapping[str, str] = {"reverse": "reverse-gap", "forward": "forward-gap"}
"""The experiment that measures the constant of each direction."""

CONFIDENCES = (0.5, 0.9, 0.95, 0.99)
SHOWN: Mapping[str, str] = {
    "replicates": "{} replicates",
    "contexts": "{} contexts",
    "actions": "{} actions",
    "references": "{} references",
    "reward_range": "reward range {:g}",
    "beta": "beta {:g}",
    "seed": "seed {}",
}
"""The settings of a measured constant that are told with it."""

_LIMITS = (("d", 1, MOST_PAIRS), ("contexts", 1, MOST_PAIRS), ("actions", 2, MOST_PAIRS), ("class_size", 2, math.inf))

BY_CLASS = "a finite class, whose log size stands in for d: the lab measures tables of rewards"
BY_FEATURES = "a linear reward, whose features stand in for d: the lab measures tables of rewards"
COMPARED = ("contexts", "actions", "references", "reward_range", "beta")
"""The settings that a plan has too."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked: see `polyref plan --help`. The rewards have one size: `d`, `class_size`, or `contexts` with `actions`.

    ConfigError for what cannot be planned.
    """

    gap: float
    beta: float
    d: int | None = None
    class_size: float | None = None
    contexts: int | None = None
    actions: int | None = None
    coverage: float | Sequence[float] | None = None
    references: int = 1
    confidence: float = 0.95
    reward_range: float = 1.0
    kl: Literal["reverse", "forward"] = "reverse"

    def __post_init__(self) -> None:
        for name in ("gap", "beta", "reward_range"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}", fix="give a finite number above 0")
        tabular = self.contexts is not None and self.actions is not None
        sizes = [self.d is not None, self.class_size is not None, self.contexts is not None or self.actions is not None]
        if sum(sizes) != 1 or (sizes[2] and not tabular):
            raise ConfigError(
                "the rewards have no size, or more than one",
                fix="give one of d (features), class_size (rewards), and contexts with actions (a table)",
            )
        for name, least, limit in _LIMITS:
            given = getattr(self, name)
            if given is not None and not least <= given < limit:
                raise ConfigError(f"{name} is {given}", fix=f"give a number of at least {least}, below {limit:g}")
        if self.references < 1:
            raise ConfigError(f"references is {self.references}", fix="give at least 1")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"confidence is {self.confidence}", fix="give a probability between 0 and 1, as in 0.95")
        if self.kl not in SOURCES:
            raise ConfigError(f"kl is {self.kl!r}", fix=f"take one of {', '.join(SOURCES)}")
        covered = self.coverage if isinstance(self.coverage, Sequence) else [self.coverage]
        if isinstance(self.coverage, Sequence) and len(covered) != self.references:
            raise ConfigError(
                f"{len(covered)} coverage constants for {self.references} references", fix="give one number, or one a reference"
            )
        if not all(one is None or one >= 1 for one in covered):
            raise ConfigError(f"coverage is {self.coverage}", fix="give numbers of at least 1: they bound probability ratios")
        if self.coverage is None and self.kl == "forward":
            raise ConfigError("forward KL has no coverage constant of its own", fix="give --coverage")
        if self.coverage is None and self.references > 1:
            raise ConfigError(
                f"{self.references} references have no coverage constant of their own: pairs come from their mixture, "
                "the anchor is their geometric composition, and their ratio has no limit",
                fix="give --coverage; exp(reward_range/beta)/F always holds, F the least normaliser of that composition",
            )
        if math.isinf(self.mixture):
            raise ConfigError("no reference covers the optimum", fix="give a finite coverage constant for one of them")

    @property
    def mixture(self) -> float:
        """C of the equal mixture of the references, which the pairs are drawn from."""
        if self.coverage is None:  # one reference, which is then the anchor
            return math.exp(min(self.reward_range / self.beta, 700.0))
        given = self.coverage if isinstance(self.coverage, Sequence) else [self.coverage]
        return mixture_coverage([float(one) for one in given])

    @property
    def dimension(self) -> float:
        """d of the measured constant: contexts * (actions - 1), or what stands in for it."""
        if self.contexts is not None and self.actions is not None:
            return self.contexts * (self.actions - 1)
        return self.d if self.d is not None else math.log(self.class_size or 0)

    def error(self, pairs: float) -> float:
        """The bound on E D^2 after `pairs` pairs."""
        delta = 1 - self.confidence
        if self.contexts is not None and self.actions is not None:
            return table_error(pairs, self.contexts, self.actions, delta, self.reward_range)
        if self.d is not None:
            return linear_error(pairs, self.d, delta, self.reward_range)
        return class_error(pairs, self.dimension, delta, self.reward_range)


@dataclass(frozen=True, slots=True)
class Answer:
    """A number of pairs (None: there is none, and `why` says so), with the ends of its interval where it was measured."""

    label: str
    kind: Literal["bound", "measured", "extrapolated"]
    pairs: int | None
    why: str
    low: int | None = None
    high: int | None = None


def answers(plan: Plan, constants: Mapping[str, Any] | None = None) -> list[Answer]:
    """Every number of pairs that polyref can state for `plan`; `constants` from `load_constants`, by default the packaged."""
    return [*_bounds(plan), _measured(plan, load_constants() if constants is None else constants)]


def measured_constants(
    name: str,
    gaps: Numbers,
    *,
    pairs: int,
    beta: float,
    dimension: int,
    coverage: float | Numbers,
    confidences: Sequence[float] = CONFIDENCES,
    seed: int = 0,
) -> tuple[Measured, ...]:
    """m at each confidence: the quantile over runs of gap * n beta/(d C), with its 95% bootstrap interval.

    `gaps` (R,) after `pairs` pairs, n beyond the knee; `dimension` d, contexts * (actions - 1) for tabular rewards; `coverage`
    C of the optimum by the law of the pairs, one number or one a run (R,).
    """
    scaled = np.asarray(gaps, dtype=np.float64) * pairs * beta / (dimension * np.asarray(coverage, dtype=np.float64))
    found = []
    for confidence in confidences:
        at = estimates(scaled, quantile(confidence), seed=seed)
        found.append(Measured(name, confidence, rounded(at.value[0]), rounded(at.low[0]), rounded(at.high[0])))
    return tuple(found)


def constants_of(results: Iterable[ExperimentResult], *, command: str, version: str) -> dict[str, Any]:
    """What `measured.json` holds: the constants that `results` measured, with their settings and the command."""
    measured = {}
    for result in results:
        plain = to_dict(result)
        if plain["measured"]:
            measured[result.name] = {"settings": plain["settings"], "constants": plain["measured"]}
    return {"command": command, "version": version, "experiments": measured}


def load_constants(text: str | None = None, *, where: str = "measured.json") -> dict[str, Any]:
    """The constants in the JSON `text`, or the packaged ones. ConfigError where `text` is not what `constants_of` makes."""
    if text is None:
        text = resources.files("polyref.theory").joinpath("measured.json").read_text(encoding="utf-8")
    try:
        found = json.loads(text)
        for name, entry in _mapping(found, "experiments", "the file").items():
            _check_entry(name, entry)
    except (ValueError, RecursionError) as error:
        fix = "write it with polyref lab reverse-gap --constants FILE"
        raise ConfigError(f"holds no measured constants: {error}", where=where, fix=fix) from error
    return dict(found)


def _check_entry(name: str, entry: Any) -> None:
    """ValueError unless `entry` holds settings and constants as `constants_of` makes them, of the numbers that are read."""
    settings = _mapping(entry, "settings", name)
    pairs, known = settings.get("pairs"), [settings[key] for key in SHOWN if key in settings]
    if not isinstance(pairs, list) or not pairs or "reward_range" not in settings or not all(map(_number, pairs + known)):
        raise ValueError(f"the settings of {name} are not numbers with a list of pairs and a reward_range")
    constants = entry.get("constants")
    if not isinstance(constants, list):
        raise ValueError(f"{name} has no list of constants")
    for index, one in enumerate(constants):
        parts = ("confidence", "low", "value", "high")
        if not isinstance(one, dict) or set(one) != {"name", *parts} or not all(_number(one[part]) for part in parts):
            raise ValueError(f"constant {index} of {name} is not a name with the numbers {', '.join(parts)}")
        if not (0 < one["confidence"] < 1 and 0 < one["low"] <= one["value"] <= one["high"]):
            raise ValueError(f"constant {index} of {name} is not 0 < low <= value <= high at a confidence between 0 and 1")


def _mapping(found: Any, key: str, where: str) -> dict[str, Any]:
    if not isinstance(found, dict) or not isinstance(found.get(key), dict):
        raise ValueError(f"{where} has no {key}")
    return dict(found[key])


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e300


def _bounds(plan: Plan) -> list[Answer]:
    coverage, confidence = plan.mixture, f"constants derived here, with probability {plan.confidence:g}"
    by = f"c(R) of the likelihood argument, C = {coverage:.4g}"
    by += "" if plan.coverage else " = exp(R/beta), as the pairs are drawn from the anchor itself"
    if plan.kl == "forward":
        pairs = pairs_needed(lambda n: transfer_bound(plan.error(n), coverage), plan.gap)
        return [Answer("bound, 1/sqrt(n)", "bound", pairs, f"forward KL, rate of [MR], {confidence}; {by}")]
    pairs = pairs_needed(lambda n: reverse_gap_bound(plan.error(n), coverage, plan.beta), plan.gap)
    why = f"reverse KL, rate of [MR], {confidence}; {by}, for every tilt of the class"
    found = [Answer("bound, 1/n", "bound", pairs, why)]
    if plan.class_size is None:
        pairs = pairs_needed(lambda n: transfer_bound(plan.error(n), coverage), plan.gap)
        who = "pessimistic policy that knows the law of the pairs"
        why = f"{who}, rate of [IT], {confidence}; the same c(R), C of the optimum alone"
        found.append(Answer("bound, 1/sqrt(n)", "bound", pairs, why))
    return found


def _measured(plan: Plan, constants: Mapping[str, Any]) -> Answer:
    source = SOURCES[plan.kl]
    nothing = Answer("measured", "measured", None, f"not measured; polyref lab {source} --constants FILE measures it")
    entry = constants["experiments"].get(source)
    known = sorted((Measured(**one) for one in entry["constants"]), key=lambda one: one.confidence) if entry else []
    if not known:
        return nothing
    enough = [one for one in known if one.confidence >= plan.confidence - 1e-9]
    if not enough:
        return replace(nothing, why=f"the lab measured up to confidence {known[-1].confidence:g}, not {plan.confidence:g}")
    used = enough[0]
    gap_of_one = plan.dimension * plan.mixture / plan.beta  # at m = 1 and n = 1
    needed = [_least_pairs(m * gap_of_one, plan.gap) for m in (used.value, used.low, used.high)]
    why = (
        f"m = {used.value:.3g} [{used.low:.3g}, {used.high:.3g}] held for {used.confidence:.0%} of the runs of {source} "
        f"({_lab_problems(entry['settings'])})"
    )
    beyond = _beyond(plan, entry["settings"], needed[0])
    if not beyond:
        return Answer("measured, 1/n", "measured", needed[0], why, needed[1], needed[2])
    why += f"; extrapolated to {'; '.join(beyond)}"
    return Answer("extrapolated, 1/n", "extrapolated", needed[0], why, needed[1], needed[2])


def _least_pairs(gap_of_one: float, gap: float) -> int:
    return pairs_needed(lambda n: gap_of_one / n, gap)


def _lab_problems(settings: Mapping[str, Any]) -> str:
    """What the constant was measured on."""
    return ", ".join(told.format(settings[key]) for key, told in SHOWN.items() if key in settings)


def _beyond(plan: Plan, settings: Mapping[str, Any], pairs: int) -> list[str]:
    """Where the plan leaves what the lab measured."""
    asked = {key: getattr(plan, key) for key in COMPARED if key in settings}
    others = [f"{key.replace('_', ' ')} {value:g}" for key, value in asked.items() if value not in (None, settings[key])]
    least, most, widest = min(settings["pairs"]), max(settings["pairs"]), settings["reward_range"]
    told = {
        BY_CLASS: plan.class_size is not None,
        BY_FEATURES: plan.d is not None,
        ", ".join(others): bool(others),
        f"a wider reward range than the lab's {widest:g}, which needs more": plan.reward_range > widest,
        f"fewer pairs than the lab's least, {least:,}, where gaps fall otherwise": pairs < least,
        f"more pairs than the lab's most, {most:,}, by the rate": pairs > most,
    }
    return [words for words, holds in told.items() if holds]
