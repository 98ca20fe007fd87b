"""How many preference pairs a target gap needs: by the bounds of `polyref.theory.bounds`, and as the lab measured it.

The measured constant m makes gap = m d C/(beta n) hold for a stated share of the lab's runs, with d the number of free reward
parameters and C the coverage of the optimum by the law of the pairs: the same form as the bound, with what really happens in
place of what cannot be excluded. It is read from `measured.json`, which `polyref lab reverse-gap --constants FILE` writes.
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
    class_error,
    linear_error,
    mixture_coverage,
    pairs_needed,
    reverse_gap_bound,
    transfer_bound,
)
from polyref.theory.regression import Numbers, estimates, quantile
from polyref.theory.results import ExperimentResult, Measured, rounded, to_dict

SOURCES: Mapping[str, str] = {"reverse": "reverse-gap", "forward": "forward-gap"}
"""The experiment that measures the constant of each direction."""

CONFIDENCES = (0.5, 0.9, 0.95, 0.99)
BY_CLASS = "log |class| stands in for the dimension, an extrapolation: the lab measures tables of rewards"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked: see `polyref plan --help`. Exactly one of `d` and `class_size`; ConfigError for what cannot be planned."""

    gap: float
    beta: float
    d: int | None = None
    class_size: float | None = None
    coverage: float | Sequence[float] | None = None
    references: int = 1
    confidence: float = 0.95
    reward_range: float = 1.0
    kl: Literal["reverse", "forward"] = "reverse"

    def __post_init__(self) -> None:
        for name in ("gap", "beta", "reward_range"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}", fix="give a finite number above 0")
        if (self.d is None) == (self.class_size is None):
            raise ConfigError("the rewards have no size, or two", fix="give one of d (features) and class_size (rewards)")
        if self.d is not None and self.d < 1:
            raise ConfigError(f"d is {self.d}", fix="give at least 1 feature")
        if self.class_size is not None and not 2 <= self.class_size < math.inf:
            raise ConfigError(f"class_size is {self.class_size}", fix="give at least 2 rewards")
        if self.references < 1:
            raise ConfigError(f"references is {self.references}", fix="give at least 1")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"confidence is {self.confidence}", fix="give a probability between 0 and 1, as in 0.95")
        if self.kl not in SOURCES:
            raise ConfigError(f"kl is {self.kl!r}", fix=f"take one of {', '.join(SOURCES)}")
        given = self.coverage if isinstance(self.coverage, Sequence) else [self.coverage] * self.references
        if len(given) != self.references:
            raise ConfigError(
                f"{len(given)} coverage constants for {self.references} references", fix="give one number, or one a reference"
            )
        if not all(one is None or one >= 1 for one in given):
            raise ConfigError(f"coverage is {self.coverage}", fix="give numbers of at least 1: they bound probability ratios")
        if self.coverage is None and self.kl == "forward":
            raise ConfigError("forward KL has no coverage constant of its own", fix="give --coverage")
        if math.isinf(self.mixture):
            raise ConfigError("no reference covers the optimum", fix="give a finite coverage constant for one of them")

    @property
    def mixture(self) -> float:
        """C of the equal mixture of the references, which the pairs are drawn from."""
        if self.coverage is None:
            return math.exp(min(self.reward_range / self.beta, 700.0))
        given = list(self.coverage) if isinstance(self.coverage, Sequence) else [self.coverage] * self.references
        return mixture_coverage([float(one) for one in given])

    def error(self, pairs: float) -> float:
        """The bound on E D^2 after `pairs` pairs."""
        delta = 1 - self.confidence
        if self.d is not None:
            return linear_error(pairs, self.d, delta, self.reward_range)
        return class_error(pairs, math.log(self.class_size or 0), delta, self.reward_range)


@dataclass(frozen=True, slots=True)
class Answer:
    """A number of pairs (None: there is none, and `why` says so), with the ends of its interval where it was measured."""

    label: str
    kind: Literal["bound", "measured"]
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
        for entry in found["experiments"].values():
            [Measured(**one) for one in entry["constants"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        fix = "write it with polyref lab reverse-gap --constants FILE"
        raise ConfigError("holds no measured constants", where=where, fix=fix) from error
    return dict(found)


def _bounds(plan: Plan) -> list[Answer]:
    coverage, confidence = plan.mixture, f"with probability {plan.confidence:g}"
    by = f"c(R) of the likelihood argument, C = {coverage:.4g}{'' if plan.coverage else ' = exp(R/beta), the worst case'}"
    if plan.kl == "forward":
        pairs = pairs_needed(lambda n: transfer_bound(plan.error(n), coverage), plan.gap)
        return [Answer("bound, 1/sqrt(n)", "bound", pairs, f"forward KL [MR], {confidence}; {by}")]
    pairs = pairs_needed(lambda n: reverse_gap_bound(plan.error(n), coverage, plan.beta), plan.gap)
    found = [Answer("bound, 1/n", "bound", pairs, f"reverse KL [MR], {confidence}; {by} for every tilt of the class")]
    if plan.d is not None:
        pairs = pairs_needed(lambda n: transfer_bound(plan.error(n), coverage), plan.gap)
        why = f"pessimistic policy [IT], {confidence}; the same c(R), and C needs to hold for the optimum alone"
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
    size = plan.d if plan.d is not None else math.log(plan.class_size or 0)
    needed = [max(1, math.ceil(m * size * plan.mixture / (plan.beta * plan.gap))) for m in (used.value, used.low, used.high)]
    why = (
        f"m = {used.value:.3g} [{used.low:.3g}, {used.high:.3g}] held for {used.confidence:.0%} of the runs of {source} "
        f"({_lab_problems(entry['settings'])})"
    )
    why += "".join(f"; {warning}" for warning in _warnings(plan, entry["settings"], needed[0]))
    return Answer("measured, 1/n", "measured", needed[0], why, needed[1], needed[2])


def _lab_problems(settings: Mapping[str, Any]) -> str:
    """What the constant was measured on."""
    known = {"replicates": "replicates", "contexts": "contexts", "actions": "actions", "references": "references"}
    sizes = [f"{settings[key]} {word}" for key, word in known.items() if key in settings]
    levels = [f"{key.replace('_', ' ')} {settings[key]:g}" for key in ("reward_range", "beta", "seed") if key in settings]
    return ", ".join([*sizes, *levels])


def _warnings(plan: Plan, settings: Mapping[str, Any], pairs: int) -> list[str]:
    """Where the plan leaves what the lab measured."""
    least, widest = min(settings.get("pairs", [0])), settings.get("reward_range", math.inf)
    told = {
        BY_CLASS: plan.d is None,
        f"fewer pairs than the lab's least, {least:,}, where gaps fall otherwise": pairs < least,
        f"a wider reward range than the lab's {widest:g} needs more": plan.reward_range > widest,
    }
    return [words for words, holds in told.items() if holds]
