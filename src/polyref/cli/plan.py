"""`polyref plan`: how many preference pairs a target gap needs, by the bounds and as the lab measured it."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace

from polyref.errors import ConfigError

if TYPE_CHECKING:
    from polyref.theory.planner import Answer, Plan


KINDS = (
    "A bound holds for every problem with these constants, and is loose: the rate is the paper's, the constants are derived in "
    "polyref.theory.bounds. A measured number is what the lab's random tables of one size needed, and promises nothing of "
    "others; an extrapolated one is what the same formula says of a problem that the lab did not measure."
)
"""What the numbers are, told below them and by --help."""


@dataclass
class PlanSettings:
    """What is wanted, and what is known of the problem. Rewards are in the units of a log-odds, as in Bradley-Terry.

    Args:
        gap: how far below the optimum, in reward units, the value of the trained policy may lie.
        beta: strength of the KL term, in reward units per nat.
        d: features of a linear reward <theta, phi> with |phi| <= 1 and |theta| <= reward_range/2. This, class_size, or contexts
            with actions.
        class_size: how many rewards a finite class holds; its logarithm counts.
        contexts: rows of a table of rewards, each of its own reward_range. With actions.
        actions: columns of that table.
        coverage: largest ratio of the policies in question to a reference, one number for all or one a reference, as in
            [4, .inf] where one does not cover. Only for one reference under reverse KL it may be left out: the pairs are then
            drawn from the anchor itself, and exp(reward_range/beta) bounds it.
        references: how many references with equal weights the pairs are drawn from.
        confidence: share of runs in which the gap has to be met.
        reward_range: largest reward less the smallest.
        kl: direction of the KL to the references.
        constants: measured constants to use, as written by polyref lab --constants; by default the packaged ones.
    """

    gap: float
    beta: float
    d: int | None = None
    class_size: float | None = None
    contexts: int | None = None
    actions: int | None = None
    coverage: float | list[float] | None = None
    references: int = 1
    confidence: float = 0.95
    reward_range: float = 1.0
    kl: Literal["reverse", "forward"] = "reverse"
    constants: str | None = None


def add_arguments(parser: ArgumentParser) -> None:
    """The verb's settings."""
    parser.add_class_arguments(PlanSettings)
    parser.epilog = KINDS


def run(settings: Namespace) -> None:
    """Print every number of pairs that can be stated. ConfigError for what cannot be planned."""
    from polyref.theory.planner import Plan, answers, load_constants

    given = {entry.name: getattr(settings, entry.name) for entry in fields(PlanSettings)}
    file = given.pop("constants")
    plan = Plan(**given)
    constants = load_constants() if file is None else load_constants(_read(file), where=str(file))
    sys.stdout.write(_told(plan, answers(plan, constants)))


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fix = "write it with polyref lab reverse-gap --constants FILE"
        raise ConfigError("cannot be read as measured constants", where=file, fix=fix) from error


def _told(plan: Plan, found: Sequence[Answer]) -> str:
    size = f"{plan.d} features" if plan.d is not None else f"a table of {plan.contexts} contexts x {plan.actions} actions"
    size = size if plan.class_size is None else f"a class of {plan.class_size:g} rewards"
    many = "1 reference" if plan.references == 1 else f"{plan.references} references of equal weight"
    head = (
        f"Preference pairs for a gap of {plan.gap:g} under {plan.kl} KL, beta {plan.beta:g}, {size}, {many} "
        f"(mixture coverage {plan.mixture:.4g}), reward range {plan.reward_range:g}, confidence {plan.confidence:g}:"
    )
    rows = [(answer.label, _pairs(answer), answer.why) for answer in found]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"  {label:<{widths[0]}}  {pairs:>{widths[1]}}  {why}" for label, pairs, why in rows]
    return "\n".join([head, "", *lines, "", *textwrap.wrap(KINDS, 120), ""])


def _pairs(answer: Answer) -> str:
    if answer.pairs is None:
        return "-"
    interval = "" if answer.low is None else f" [{answer.low:,}, {answer.high:,}]"
    return f"{answer.pairs:,}{interval}"
