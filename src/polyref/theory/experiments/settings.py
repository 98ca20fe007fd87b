"""Offline, online and hybrid learning at equal labels, from good and from bad offline data [IT]."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from polyref.theory.experiments import Experiment, Progress, _linear, _words
from polyref.theory.gshf import offline_greedy, offline_policy_level
from polyref.theory.online import Learner, Strategy, enhancing, fixed, run_hybrid, run_rounds
from polyref.theory.replicates import map_replicates
from polyref.theory.results import Agreement, Estimate, ExperimentResult, Panel, Table

TITLE = "Offline, online and hybrid learning at equal labels"
LABELS, BATCH, OFFLINE = 1600, 50, 400
ROUNDS: Final = LABELS // BATCH
DATA: Final = {"good": "good offline data", "bad": "bad offline data"}
GREEDY, PESSIMIST, HYBRID, ONLINE = "offline, greedy", "offline, policy level", "hybrid", "online"
NOTES: Final = (
    *_linear.ASSUMPTIONS,
    "Offline data: pairs from the mixture of the references (good), or from softmax(6 normal), one or two actions a "
    f"context (bad). Hybrid: {OFFLINE} offline labels, then the main agent against the anchor, in batches of {BATCH}. "
    f"Online: the main agent against its enhancer, c = {_linear.SCALE:g}. Pairs are independent draws: those of one "
    "completion twice are paid for and teach nothing.",
)


def run(replicates: int, seed: int, progress: Progress) -> ExperimentResult:
    """The gap against the labels of each setting, and its ratios at the last one."""
    gaps = map_replicates(_chunk, replicates, seed, chunk=50, progress=progress)
    labels = [BATCH * t for t in range(1, ROUNDS + 1)]
    late = labels[OFFLINE // BATCH - 1 :]
    settings = {GREEDY: labels, PESSIMIST: labels, HYBRID: late}
    last = {(kind, name): gaps[f"{kind}/{name}"][:, -1] for kind in DATA for name in settings}
    online = gaps[ONLINE][:, -1]
    ratios = {key: _words.ratio_cell(values, online) for key, values in last.items()}
    mended = {kind: _words.ratio_cell(last[kind, HYBRID], last[kind, GREEDY]) for kind in DATA}
    agreement, finding = _finding(ratios, mended)
    rows = [(DATA[key[0]], key[1], _words.mean_cell(values), ratios[key]) for key, values in last.items()]
    return ExperimentResult(
        name="settings",
        title=TITLE,
        question="For a given number of labels: data at hand, the policy as it learns, or both?",
        claim="Online exploration needs no coverage by offline data; hybrid learning mends data that lack it [IT].",
        finding=finding,
        agreement=agreement,
        panels=tuple(
            Panel(
                text.capitalize(),
                "labels",
                "J(π*) − J(π̂)",
                (
                    *(_linear.curve(name, x, gaps[f"{kind}/{name}"].T[-len(x) :]) for name, x in settings.items()),
                    _linear.curve(ONLINE, labels, gaps[ONLINE].T[1:]),
                ),
            )
            for kind, text in DATA.items()
        ),
        table=Table(
            ("offline data", "setting", f"gap at {LABELS:,} labels", "over online"),
            (*rows, ("none", ONLINE, _words.mean_cell(online), None)),
        ),
        settings=_linear.settings(replicates, seed, labels=LABELS, batch=BATCH, offline_labels=OFFLINE, scale=_linear.SCALE),
        notes=(
            *_comparisons(ratios, mended),
            *NOTES,
        ),
    )


def _chunk(generator: torch.Generator, size: int) -> dict[str, Tensor]:
    bandit = _linear.problems(generator, size)
    laws = {"good": bandit.mixture, "bad": _linear.few_actions(generator, size)}

    def learn(strategy: Strategy, learner: Learner = offline_greedy) -> Tensor:
        return run_rounds(
            bandit,
            strategy,
            generator,
            rounds=ROUNDS,
            batch_size=BATCH,
            replicates=size,
            learner=learner,
            radius=_linear.RADIUS,
        ).gap

    results = {ONLINE: learn(enhancing(_linear.SCALE))}
    for kind, mu in laws.items():
        results[f"{kind}/{GREEDY}"] = learn(fixed(mu))
        results[f"{kind}/{PESSIMIST}"] = learn(
            fixed(mu), lambda theta, matrix, own: offline_policy_level(theta, matrix, own, scale=_linear.SCALE)
        )
        results[f"{kind}/{HYBRID}"] = run_hybrid(
            bandit,
            fixed(mu),
            generator,
            offline_labels=OFFLINE,
            rounds=(LABELS - OFFLINE) // BATCH,
            batch_size=BATCH,
            replicates=size,
            radius=_linear.RADIUS,
        ).gap
    return results


def _finding(ratios: dict[tuple[str, str], Estimate], mended: dict[str, Estimate]) -> tuple[Agreement, str]:
    """Of the two claims about bad data, offline greedy above online, hybrid below offline: each holds, is reversed, or open."""
    agreement = _words.joint((_words.side(ratios["bad", GREEDY]), -_words.side(mended["bad"])))
    return agreement, _words.finding(
        "bad offline coverage hurts offline learning, and hybrid learning mends it",
        f"at {LABELS:,} labels from bad data, {_words.told(ratios['bad', GREEDY])} times the gap of online learning for the "
        f"greedy offline learner, and {_words.told(mended['bad'])} times the gap of that one for hybrid learning",
        _words.outcome(agreement),
    )


def _comparisons(ratios: dict[tuple[str, str], Estimate], mended: dict[str, Estimate]) -> list[str]:
    """Every setting beside online learning, and hybrid beside offline, one sentence each."""
    over = "; ".join(
        f"{text}: " + ", ".join(f"{name} {_words.told(ratios[kind, name])}" for name in (GREEDY, PESSIMIST, HYBRID))
        for kind, text in DATA.items()
    )
    return [
        f"Gap over that of online learning at {LABELS:,} labels, {over}.",
        f"Gap of hybrid over offline, greedy: {_words.told(mended['good'])} from good data, {_words.told(mended['bad'])} from "
        "bad.",
    ]


EXPERIMENT = Experiment("settings", TITLE, run, default_replicates=100, seconds=15.0)
