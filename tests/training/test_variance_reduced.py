"""Training with an auxiliary preference model as control variate, by enumeration of what the data could have been."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fakes import auxiliary_columns, counted_calls, pair_rows, tiny_llama, tiny_lora
from pair_outcomes import CYCLE, LOSSES, WRONG, assert_known_variance, expectation, outcomes, pair_losses
from polyref import PreferenceConfig, PreferenceTrainer, Reference, ReferenceSet
from polyref.data.auxiliary import auxiliary_completions
from polyref.data.collate import row_length
from polyref.data.records import parse_record
from polyref.errors import ConfigError, DataError
from polyref.objectives.variance_reduced import VarianceReduced, realised_factor, term_variances
from polyref.training.auxiliary import auxiliary_records
from polyref.training.dataset import PairCollator
from polyref.training.step_objective import SQUARE, VarianceReducedStep

ANCHORS = [("geometric", "reverse"), ("arithmetic", "forward"), ("arithmetic", "reverse")]


class World:
    """A tokenizer and trainers whose policy is not its reference, so that implied rewards are not all 0."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.path, self.tokenizer = path, tokenizer

    def trainer(self, rows: Any, held_out: Any = None, *, references: Any = None, peft: Any = None, **changes: Any) -> Any:
        usual = {
            "output_dir": str(self.path / "run"),
            "cache_dir": str(self.path / "cache"),
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
        references = references or Reference(tiny_llama(self.tokenizer, seed=1))
        torch.manual_seed(0)
        policy = tiny_llama(self.tokenizer)
        args = PreferenceConfig(**usual | changes)
        return PreferenceTrainer(policy, references, args, rows, held_out, self.tokenizer, peft)


@pytest.fixture
def world(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> World:
    return World(tmp_path, tiny_tokenizer)


def settings(loss_type: str) -> dict[str, Any]:
    return {"loss_type": loss_type, "label_smoothing": 0.15 if loss_type in ("smoothed", "robust") else 0.0, "beta": 0.3}


def mixed(world: World, composition: Any) -> ReferenceSet:
    members = tuple(Reference(tiny_llama(world.tokenizer, seed=seed)) for seed in (1, 2))
    return ReferenceSet(members, (0.3, 0.7), composition)


# Expectation and variance.


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize(("composition", "divergence"), ANCHORS)
def test_no_auxiliary_model_biases_the_step_or_its_gradient(
    world: World, loss_type: str, composition: str, divergence: str
) -> None:
    common = settings(loss_type) | {"divergence": divergence, "references": mixed(world, composition)}
    plain_rows, plain_chances = outcomes(CYCLE, 0)
    value, slope = expectation(world.trainer(plain_rows, **common), plain_chances)
    assert slope.norm() > 1e-3
    rows, chances = outcomes(WRONG, 2)
    for control in (1.0, 0.6, "optimal"):
        trainer = world.trainer(rows, objective="variance_reduced", control_coefficient=control, **common)
        found, found_slope = expectation(trainer, chances)
        assert found == pytest.approx(value, rel=1e-4)
        assert (found_slope - slope).norm() < 1e-4 * slope.norm()


@pytest.mark.parametrize(
    ("loss_type", "pairs", "control"),
    [(loss, pairs, control) for loss in ("sigmoid", "ipo") for pairs in (1, 4) for control in (1.0, "optimal")]
    + [("sigmoid", 16, 1.0)],
)
def test_with_the_true_preference_the_variance_is_the_known_one(world: World, loss_type: str, pairs: int, control: Any) -> None:
    plain = world.trainer(outcomes(CYCLE, 0)[0], **settings(loss_type))
    trainer = world.trainer(
        outcomes(CYCLE, pairs)[0], objective="variance_reduced", control_coefficient=control, **settings(loss_type)
    )
    assert_known_variance(plain, trainer, pairs, control)


def test_control_0_is_plain_training_and_the_label_as_prediction_leaves_the_auxiliary_term(world: World) -> None:
    rows = pair_rows(8, **auxiliary_columns(3))
    runs = []
    for changes in ({}, {"objective": "variance_reduced", "control_coefficient": 0.0}):
        trainer = world.trainer(rows, max_steps=1, **changes)
        trainer.train()
        runs.append(trainer)
    for name in ("loss", "grad_norm", "rewards/margins"):
        assert runs[0].state.log_history[0][name] == pytest.approx(runs[1].state.log_history[0][name], rel=1e-5)
    trainer = world.trainer([row | {"predicted_probability": 1.0} for row in rows], objective="variance_reduced")
    losses, terms = pair_losses(trainer)
    assert terms is not None
    torch.testing.assert_close(losses.detach().double(), terms.auxiliary)


def test_no_gradient_reaches_the_auxiliary_model(world: World) -> None:
    trainer = world.trainer(pair_rows(4, **auxiliary_columns(2)), objective="variance_reduced")
    batch = trainer.data_collator(list(trainer.train_dataset.pairs))
    words = [batch[name].requires_grad_() for name in ("predicted_probability", "auxiliary_probability")]
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()
    assert all(word.grad is None for word in words)


# The step.


@pytest.mark.parametrize("pairs", [1, 4])
def test_a_step_passes_each_prompt_once(world: World, pairs: int) -> None:
    trainer = world.trainer(pair_rows(8, **auxiliary_columns(pairs)), objective="variance_reduced")
    with counted_calls() as calls:
        trainer.train()
    assert [rows for rows, _ in calls] == [4, 4]
    lengths = trainer.train_dataset.lengths
    assert max(width for _, width in calls) == max(lengths)
    assert lengths == [row_length(p.tokens.prompt_ids, p.tokens.completions) for p in trainer.train_dataset.pairs]
    assert all(len(p.tokens.completions) == len(p.anchor) == 2 + 2 * pairs for p in trainer.train_dataset.pairs)


def test_rows_of_one_completion_give_the_same_step(world: World) -> None:
    trainer = world.trainer(pair_rows(5, **auxiliary_columns(2)), objective="variance_reduced", length_normalise=True)
    shared, _ = pair_losses(trainer)
    trainer.plan = replace(trainer.plan, layout="separate", fused=False)
    trainer.data_collator = PairCollator("separate")
    torch.testing.assert_close(pair_losses(trainer)[0], shared, rtol=1e-4, atol=1e-5)


def test_accumulated_batches_are_one_batch(world: World) -> None:
    found = []
    for size, accumulation in ((4, 1), (2, 2)):
        trainer = world.trainer(
            pair_rows(4, **auxiliary_columns(2)),
            objective="variance_reduced",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        found.append(trainer.state.log_history[0])
    shared = {"loss", "grad_norm", "vr/data", "vr/auxiliary", "vr/data_variance", "vr/factor"}
    for name in shared:
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-3)


# What is logged.


def test_a_log_line_holds_the_terms_their_variances_and_the_realised_factor(world: World) -> None:
    rows = pair_rows(10, **auxiliary_columns(4))
    seen: list[Tensor] = []
    original = VarianceReducedStep.__call__

    def recorded(self: Any, step: Any) -> Any:
        losses, values = original(self, step)
        seen.append(values[:, :4])
        return losses, values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VarianceReducedStep, "__call__", recorded)
        trainer = world.trainer(rows, objective="variance_reduced", logging_steps=3)
        trainer.train()
    assert len(seen) == 3
    terms = VarianceReduced(*torch.cat(seen).unbind(1))
    line, variances = trainer.state.log_history[0], term_variances(terms)
    for name in ("data", "correction", "auxiliary"):
        assert line[f"vr/{name}"] == pytest.approx(float(getattr(terms, name).mean()))
        assert line[f"vr/{name}_variance"] == pytest.approx(float(getattr(variances, name)))
    assert line["vr/loss_variance"] == pytest.approx(float(variances.loss))
    assert line["vr/factor"] == pytest.approx(float(realised_factor(terms)))
    assert not [name for name in line if SQUARE in name]


def test_one_pair_has_no_variance_and_equal_losses_no_factor() -> None:
    objective = VarianceReducedStep(lambda h, chosen_probability=None: h, 1.0)
    means = dict.fromkeys(objective.columns, 1.0)
    assert set(objective.summary(means, 1)) == {"vr/data", "vr/correction", "vr/auxiliary", "vr/coefficient"}
    assert objective.summary(means, 2)["vr/loss_variance"] == 0.0 and "vr/factor" not in objective.summary(means, 2)
    spread = means | {name + SQUARE: 1 + excess for name, excess in (("vr/data", 3.0), ("vr/loss", 2.0))}
    assert objective.summary(spread, 2)["vr/factor"] == 1.5


def test_evaluation_is_of_the_plain_pair_loss_and_reads_no_auxiliary_column(world: World) -> None:
    rows, columns = pair_rows(6), auxiliary_columns(3)
    plain = world.trainer(rows, rows)
    reduced = world.trainer(
        pair_rows(6, **columns), {"bare": rows, "full": pair_rows(6, **columns)}, objective="variance_reduced"
    )
    expected = plain.evaluate()["eval_loss"]
    with counted_calls() as calls:
        found = reduced.evaluate()
    assert found["eval_bare_loss"] == found["eval_full_loss"] == expected and not [k for k in found if "vr/" in k]
    assert reduced.reference_scores["full"].hit_rate == 1.0 and len(set(calls)) == 1


def test_plain_training_leaves_auxiliary_columns_unread(world: World) -> None:
    lines, weights = [], []
    for rows in (pair_rows(8), pair_rows(8, **auxiliary_columns(2))):
        trainer = world.trainer(rows)
        trainer.train()
        lines.append(
            [{k: v for k, v in line.items() if "per_second" not in k and "runtime" not in k} for line in _log(trainer)]
        )
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert lines[0] == lines[1] and torch.equal(*weights)


def _log(trainer: Any) -> Sequence[dict[str, Any]]:
    return trainer.state.log_history


@pytest.mark.parametrize("peft", [None, tiny_lora(lora_dropout=0.1)], ids=["weights", "adapter"])
def test_a_resumed_run_is_the_unbroken_run_to_the_last_bit(world: World, peft: Any) -> None:
    def trainer(name: str) -> Any:
        return world.trainer(
            pair_rows(10, **auxiliary_columns(2)),
            peft=peft,
            output_dir=str(world.path / name),
            objective="variance_reduced",
            control_coefficient="optimal",
            num_train_epochs=2,
            per_device_train_batch_size=2,
            logging_steps=2,
            save_strategy="steps",
            save_steps=3,
        )

    def run(name: str, **how: Any) -> tuple[Any, Tensor]:
        made = trainer(name)
        made.train(**how)
        lines = [{k: v for k, v in line.items() if not k.endswith(("_runtime", "_per_second"))} for line in _log(made)]
        return lines, torch.cat([p.detach().flatten() for p in made.model.parameters()])

    lines, weights = run("unbroken")
    again, resumed = run("resumed", resume_from_checkpoint=str(world.path / "unbroken" / "checkpoint-3"))
    assert torch.equal(weights, resumed) and lines == again


# What is refused.


def test_rows_without_an_auxiliary_model_are_refused_in_one_line(world: World) -> None:
    full = pair_rows(3, **auxiliary_columns(2))
    two_kinds = [full[0], pair_rows(1)[0]]
    cases = (
        (pair_rows(3), "row 1, column auxiliary_1: is missing, and objective variance_reduced needs it"),
        (two_kinds, "row 2, column auxiliary_1: is missing, and objective variance_reduced needs it"),
        ([full[0], pair_rows(1, **auxiliary_columns(1))[0]], "row 2, column auxiliary_1: holds 1 auxiliary pairs where row 1"),
        ([row | {"margin": 0.5} for row in full], "row 1, column margin: has no counterpart for auxiliary pairs"),
        ([full[0], full[1] | {"predicted_probability": None}], "row 2, column predicted_probability: is missing"),
    )
    for rows, words in cases:
        with pytest.raises(DataError, match=words) as error:
            world.trainer(rows, objective="variance_reduced")
        assert "\n" not in str(error.value)
    records = [parse_record(row, source="f", row_number=i) for i, row in enumerate(full, 1)]
    with pytest.raises(DataError, match="f, row 2, column auxiliary_probability: holds 1 entries"):
        world.trainer([records[0], replace(records[1], auxiliary_probability=(0.5,))], objective="variance_reduced")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"predicted_probability": 2.0}, "predicted_probability: is 2, outside 0 to 1"),
        ({"predicted_probability": math.inf}, "predicted_probability: is inf, not a finite number"),
        ({"auxiliary_probability": (0.5, math.nan)}, "auxiliary_probability: entry 2 is nan, not a finite number"),
        (
            {"auxiliary_1": (), "auxiliary_2": (), "auxiliary_probability": ()},
            "auxiliary_1: is an empty list; give at least one",
        ),
    ],
)
def test_records_made_in_memory_are_checked_as_those_of_a_file_are(changes: dict[str, Any], words: str) -> None:
    full = [parse_record(row, source="f", row_number=i) for i, row in enumerate(pair_rows(3, **auxiliary_columns(2)), 1)]
    assert auxiliary_records(full, "variance_reduced") == full
    with pytest.raises(DataError, match=f"^f, row 2, column {words}"):
        auxiliary_records([full[0], replace(full[1], **changes), full[2]], "variance_reduced")


def test_rows_that_differ_in_columns_not_read_train_and_evaluate(world: World) -> None:
    full = pair_rows(4, **auxiliary_columns(2))
    mixed = [*full[:2], *pair_rows(4)[2:]]
    assert len(world.trainer(mixed, objective="plain").train_dataset) == 4
    assert len(world.trainer(full, mixed, objective="variance_reduced").eval_dataset) == 4
    half = [replace(parse_record(row, source="f", row_number=1), auxiliary_2=(" c",)) for row in pair_rows(4)]
    assert all(not auxiliary_completions(pair.record) for pair in world.trainer(half).train_dataset.pairs)


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "best"},
        {"objective": "variance_reduced", "control_coefficient": "most"},
        {"objective": "variance_reduced", "control_coefficient": -0.5},
        {"objective": "variance_reduced", "control_coefficient": math.nan},
        {"control_coefficient": 0.5},
        {"control_coefficient": "estimated"},
        {"control_coefficient": "optimal", "objective": "doubly_robust"},
        {"objective": "variance_reduced", "importance_clip": 3.0},
        {"objective": "doubly_robust", "importance_clip": 0.0},
        {"objective": "variance_reduced", "dr_beta": 2.0},
        {"objective": "doubly_robust", "loss_type": "ipo"},
        {"objective": "doubly_robust", "label_smoothing": 0.1},
        {"objective": "doubly_robust", "length_normalise": True},
        {"objective": "doubly_robust", "divergence": "forward"},
    ],
    ids=str,
)
def test_settings_that_contradict_the_objective_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        PreferenceConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **changes)
    assert "\n" not in str(error.value) and ";" in str(error.value)
