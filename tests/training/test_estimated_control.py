"""Training with a control coefficient that is estimated from earlier steps: a policy, and a reward model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fakes import auxiliary_columns, pair_rows, same, saved_llama, tiny_llama
from pair_outcomes import CYCLE, TEXTS, UNORDERED, WRONG, expectation, outcomes
from polyref import PreferenceConfig, PreferenceTrainer, Reference, RewardConfig, RewardTrainer
from polyref.objectives.variance_reduced import optimal_control
from polyref.training.step_objective import VarianceReducedStep

ESTIMATED: dict[str, Any] = {"objective": "variance_reduced", "control_coefficient": "estimated"}
SURE = torch.tensor([[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]], dtype=torch.float64)

Make = Callable[..., Any]


@pytest.fixture(params=["policy", "reward"])
def make(request: pytest.FixtureRequest, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Make:
    """Trainers of a policy that is not its reference, or of a reward model."""
    usual: dict[str, Any] = {
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }

    def policy(rows: Any, **changes: Any) -> PreferenceTrainer:
        torch.manual_seed(0)
        args = PreferenceConfig(**usual | {"beta": 0.05, "cache_dir": str(tmp_path / "cache")} | changes)
        reference = Reference(tiny_llama(tiny_tokenizer, seed=1))
        return PreferenceTrainer(tiny_llama(tiny_tokenizer), reference, args, rows, processing_class=tiny_tokenizer)

    def reward(rows: Any, **changes: Any) -> RewardTrainer:
        base = saved_llama(tmp_path / "base", tiny_tokenizer)
        return RewardTrainer(base, RewardConfig(**usual | changes), rows, processing_class=tiny_tokenizer)

    return policy if request.param == "policy" else reward


def coefficients(trainer: Any) -> list[float]:
    return [line["vr/coefficient"] for line in trainer.state.log_history if "loss" in line]


def soft_rows(count: int) -> list[dict[str, Any]]:
    """Labels and predictions between which the coefficient is inside its bounds, for a model that prefers little."""
    said = {"chosen_probability": lambda i: 0.6 + 0.02 * (i % 10), "predicted_probability": lambda i: 0.95 - 0.03 * (i % 10)}
    return pair_rows(count, **auxiliary_columns(2) | said)


def sampled(count: int, auxiliary: int, *, informed: bool) -> list[dict[str, Any]]:
    """Pairs labelled by SURE; g is SURE itself, or as sure of something else in every pair."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    rows = []
    for _ in range(count):
        cells = [UNORDERED[int(3 * u)] for u in draw(1 + auxiliary)]
        first, second = cells[0] if draw(1) < SURE[cells[0]] else cells[0][::-1]
        said = [float(SURE[cell] if informed else SURE[0, 1 + int(2 * draw(1))]) for cell in [(first, second), *cells[1:]]]
        rows.append(
            {"prompt": "question", "chosen": TEXTS[first], "rejected": TEXTS[second], "predicted_probability": said[0]}
            | {f"auxiliary_{side + 1}": [TEXTS[cell[side]] for cell in cells[1:]] for side in (0, 1)}
            | {"auxiliary_probability": said[1:]}
        )
    return rows


@pytest.mark.parametrize("g", [CYCLE, WRONG], ids=["right", "wrong"])
def test_no_past_biases_the_step_or_its_gradient(make: Make, g: Tensor) -> None:
    plain_rows, plain_chances = outcomes(CYCLE, 0)
    value, slope = expectation(make(plain_rows), plain_chances)
    rows, chances = outcomes(g, 2)
    trainer = make(rows, **ESTIMATED)
    for past, control in (([0.0, 0.0], 2 / 3), ([0.3, 0.8], 0.25), ([-1.0, 1.0], 0.0), ([9.0, 1.0], 1.0)):
        trainer.step_objective.estimate.sums = torch.tensor(past, dtype=torch.float64)
        found, found_slope = expectation(trainer, chances)
        assert found == pytest.approx(value, rel=1e-4)
        assert (found_slope - slope).norm() < 1e-4 * slope.norm()
        assert trainer.step_objective.coefficient(2) == pytest.approx(control), "a batch does not count for itself"


def test_each_step_takes_the_pairs_of_the_steps_before_it(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches a step, which share a coefficient."""
    seen: list[Tensor] = []
    original = VarianceReducedStep.__call__

    def recorded(self: Any, step: Any) -> Any:
        z, g, s = step.inputs["chosen_probability"], step.inputs["predicted_probability"], step.h.detach().sigmoid()
        seen.append(torch.stack([(z - s) * (g - s), (g - s) ** 2]).double().sum(1))
        return original(self, step)

    monkeypatch.setattr(VarianceReducedStep, "__call__", recorded)
    trainer = make(soft_rows(12), per_device_train_batch_size=2, gradient_accumulation_steps=2, **ESTIMATED)
    trainer.train()
    found = coefficients(trainer)
    assert len(seen) == 6 and found[0] == pytest.approx(optimal_control(2))
    for step in (1, 2):
        product, square = torch.stack(seen[: 2 * step]).sum(0).tolist()
        assert found[step] == pytest.approx(min(max(product / (1.5 * square), 0.0), 1.0), rel=1e-5, abs=1e-6)
    assert len(set(found)) == 3 and all(0 <= c <= 1 for c in found)
    trainer.train()
    assert coefficients(trainer)[0] == pytest.approx(found[0]), "a new training knows nothing yet"


@pytest.mark.parametrize("informed", [True, False])
def test_it_ends_near_the_optimal_one_or_near_none(make: Make, informed: bool) -> None:
    """Bounds are some four standard errors of 600 pairs; of a model that prefers little, so that g = 1/2 would tell nothing."""
    trainer = make(sampled(600, 4, informed=informed), per_device_train_batch_size=60, learning_rate=3e-4, **ESTIMATED)
    trainer.train()
    last = trainer.step_objective.coefficient(4)
    assert abs(last - optimal_control(4)) < 0.1 if informed else last < 0.15


def test_accumulated_batches_are_one_batch(make: Make) -> None:
    found = []
    for size, accumulation in ((4, 1), (2, 2)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = make(soft_rows(4), num_train_epochs=3, optim="sgd", **sizes, **ESTIMATED)
        trainer.train()
        found.append(coefficients(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-6) and len(set(found[0])) == 3


def test_a_resumed_run_is_the_unbroken_run_to_the_last_bit(make: Make, tmp_path: Path) -> None:
    def run(name: str, **how: Any) -> tuple[Any, ...]:
        trainer = make(
            soft_rows(10),
            output_dir=str(tmp_path / name),
            num_train_epochs=2,
            per_device_train_batch_size=2,
            logging_steps=2,
            save_strategy="steps",
            save_steps=3,
            **ESTIMATED,
        )
        trainer.train(**how)
        timeless = ("_runtime", "_per_second")
        lines = [{k: v for k, v in line.items() if not k.endswith(timeless)} for line in trainer.state.log_history]
        assert len({line["vr/coefficient"] for line in lines if "loss" in line}) > 2
        return lines, trainer.step_objective.estimate.sums, dict(trainer.model.state_dict())

    unbroken = run("unbroken")
    assert same(run("resumed", resume_from_checkpoint=str(tmp_path / "unbroken" / "checkpoint-3")), unbroken)
