"""What a step minimises where an auxiliary preference model takes part, and what the next log line says of it.

A strategy gives one loss a pair with gradient, and values of that pair whose means over pairs, in float64, make the log.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import TrainerCallback

from polyref.objectives.doubly_robust import direct_value, doubly_robust_value, importance_diagnostics, kl_penalty
from polyref.objectives.pairwise import PairLoss
from polyref.objectives.variance_reduced import control_moments, optimal_control, variance_reduced
from polyref.training.estimated_control import EstimatedControl

ControlCoefficient = float | Literal["optimal", "estimated"]

SQUARE = " squared"

ROUNDING: Final = 1e-10
"""Variances below this share of a squared mean are taken to be rounding errors of float32."""


class Step(NamedTuple):
    """A batch of B pairs with M auxiliary pairs each: reward differences, (B,) and (B, M), implied or of a reward model."""

    h: Tensor
    auxiliary_h: Tensor
    inputs: Mapping[str, Tensor]
    """What `PairCollator` made: the labels, what the auxiliary model says and, by completion, `anchor` and, where it is needed,
    `sampling`: (B, 2 + 2M). Of a policy also its log-probabilities `logps` of the same completions."""


class StepObjective(Protocol):
    """One objective. `columns` names the values that `__call__` gives beside the losses: (B,) and, in float64, (B, columns).

    `callbacks` are told of every optimiser step and every resume.
    """

    columns: tuple[str, ...]
    callbacks: tuple[TrainerCallback, ...]

    def __call__(self, step: Step) -> tuple[Tensor, Tensor]: ...

    def summary(self, means: Mapping[str, float], pairs: int) -> dict[str, float]:
        """What a log line says, from the means of `columns` over `pairs` pairs."""
        ...


class VarianceReducedStep:
    """`objectives.variance_reduced` of any pair loss.

    Logs the means of the terms `vr/data`, `vr/correction` and `vr/auxiliary`, the control coefficient `vr/coefficient` (the
    mean over the line where it is estimated), the variance of each term over the pairs of the line and that of the loss
    (`vr/loss_variance`), and `vr/factor`: Var(plain loss)/Var(loss), above 1 where the auxiliary model helps. The variances
    hold the spread between prompts too, so `vr/factor` understates the gain given the prompt.
    """

    terms = ("vr/loss", "vr/data", "vr/correction", "vr/auxiliary")
    columns: tuple[str, ...] = (*terms, *(name + SQUARE for name in terms), "vr/coefficient")

    def __init__(self, loss: PairLoss, control: ControlCoefficient) -> None:
        self.loss, self.control = loss, control
        self.estimate = EstimatedControl() if control == "estimated" else None
        self.callbacks: tuple[TrainerCallback, ...] = (self.estimate,) if self.estimate is not None else ()

    def __call__(self, step: Step) -> tuple[Tensor, Tensor]:
        z, g = step.inputs["chosen_probability"], step.inputs["predicted_probability"]
        control = self.coefficient(step.auxiliary_h.shape[-1])
        said = step.inputs["auxiliary_probability"]
        terms = variance_reduced(step.h, z, g, step.auxiliary_h, said, self.loss, control=control)
        if self.estimate is not None:
            self.estimate.add(control_moments(step.h, z, g, self.loss))
        values = torch.stack(terms, 1).detach().cpu().double()
        return terms.loss, torch.cat([values, values**2, values.new_full((len(values), 1), control)], 1)

    def coefficient(self, auxiliary_pairs: int) -> float:
        """c of this step, for M auxiliary pairs a data pair."""
        if self.estimate is not None:
            return self.estimate.coefficient(auxiliary_pairs)
        return optimal_control(auxiliary_pairs) if self.control == "optimal" else float(self.control)

    def summary(self, means: Mapping[str, float], pairs: int) -> dict[str, float]:
        """Means of the three terms, c and, from two pairs on, variances and, where the loss varies, their ratio."""
        shown = {name: means[name] for name in (*self.terms[1:], "vr/coefficient")}
        if pairs < 2:
            return shown
        scale = pairs / (pairs - 1)
        variances = {name: scale * max(means[name + SQUARE] - means[name] ** 2, 0.0) for name in self.terms}
        shown |= {f"{name}_variance": variance for name, variance in variances.items()}
        if variances["vr/loss"] <= ROUNDING * means["vr/data"] ** 2:  # as at the start of training, where every h is 0
            return shown
        return shown | {"vr/factor": variances["vr/data"] / variances["vr/loss"]}


class DoublyRobustStep:
    """-(doubly robust value) + beta KL: the auxiliary pairs, drawn from the law of `sampling`, give the direct part and the KL.

    Logs `dr/value` (the estimated win rate of the policy over the sampling policy), `dr/kl` (the estimated KL to the anchor in
    nats, which geometric anchors shift by a constant of the prompts), and of the importance weights of all completions their
    mean `dr/weight` (1 where the sampling policy is right and nothing is clipped), the share clipped `dr/clip_share`, and
    `dr/ess`, their effective sample size as a share of their number.

    Data hold no pair of equal completions. By their absence `dr/value` less 1/2, and every gradient, is 1/(1 - sum_y q(y|x)^2)
    times what independent draws give at a prompt x, and the other means lean to completions that q finds unlikely.
    """

    callbacks: tuple[TrainerCallback, ...] = ()
    columns: tuple[str, ...] = ("dr/value", "dr/kl", "dr/clip_share", "dr/weight", "dr/weight" + SQUARE)

    def __init__(self, beta: float, clip: float | None) -> None:
        self.beta, self.clip = beta, clip

    def __call__(self, step: Step) -> tuple[Tensor, Tensor]:
        logps = step.inputs["logps"]
        ratios = logps - step.inputs["sampling"]
        first, second = ratios[:, 2::2], ratios[:, 3::2]
        direct = direct_value(step.inputs["auxiliary_probability"], first, second, clip=self.clip).mean(-1)
        z, g = step.inputs["chosen_probability"], step.inputs["predicted_probability"]
        value = doubly_robust_value(z, g, direct, ratios[:, 0], ratios[:, 1], clip=self.clip)
        to_anchor = logps - step.inputs["anchor"]
        kl = kl_penalty(to_anchor[:, 2::2], to_anchor[:, 3::2], first, second, clip=self.clip).mean(-1)
        share, _ = importance_diagnostics(ratios, self.clip)
        weights = ratios.detach().double().exp().clamp(max=math.inf if self.clip is None else self.clip)
        values = [value, kl, share, weights.mean(-1), (weights**2).mean(-1)]
        return self.beta * kl - value, torch.stack([v.detach().cpu().double() for v in values], 1)

    def summary(self, means: Mapping[str, float], pairs: int) -> dict[str, float]:
        """The means, with the mean square of the weights made into a share of effective samples."""
        square = means["dr/weight" + SQUARE]
        return {name: means[name] for name in self.columns[:-1]} | {
            "dr/ess": means["dr/weight"] ** 2 / square if square > 0 else 0.0
        }


OBJECTIVES: Mapping[str, Callable[[PairLoss, float, ControlCoefficient, float | None], StepObjective | None]] = {
    "plain": lambda loss, beta, control, clip: None,
    "variance_reduced": lambda loss, beta, control, clip: VarianceReducedStep(loss, control),
    "doubly_robust": lambda loss, beta, control, clip: DoublyRobustStep(beta, clip),
}
"""objective -> factory (pair loss, beta, control coefficient, importance clip); plain training has no auxiliary model."""
