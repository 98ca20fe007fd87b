"""Training on weighted samples: its optimum by enumeration, its loss by hand, rows and batches, a resumed run the same run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from fakes import counted_calls, same, saved_llama, tiny_llama, tiny_lora
from polyref.data.sample_tokens import tokenize_samples
from polyref.data.samples import load_samples
from polyref.errors import ConfigError, DataError, InputError, ModelError, TrainingDivergedError
from polyref.references.compose import arithmetic, geometric
from polyref.samplers.tilt import forward, importance
from polyref.theory.solutions import solve_forward_kl, solve_reverse_kl
from polyref.training.likelihood_config import LikelihoodConfig
from polyref.training.likelihood_evaluate import likelihood_report
from polyref.training.likelihood_trainer import METRICS, LikelihoodTrainer
from polyref.training.sample_rows import RowCollator, SampleRows
from toy_lm import END, completions, total_variation
from toy_lm import World as Toy

Rows = list[dict[str, Any]]


class World:
    """A tokenizer and trainers that differ in what a test is about."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.path, self.tokenizer = path, tokenizer

    def config(self, **changes: Any) -> LikelihoodConfig:
        usual = {
            "output_dir": str(self.path / "run"),
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
        return LikelihoodConfig(**usual | changes)

    def trainer(self, rows: Rows, held_out: Any = None, *, model: Any = None, peft: Any = None, **changes: Any) -> Any:
        callbacks = changes.pop("callbacks", None)
        model = tiny_llama(self.tokenizer) if model is None else model
        return LikelihoodTrainer(model, self.config(**changes), rows, held_out, self.tokenizer, peft, callbacks=callbacks)

    def nlls(self, model: nn.Module, rows: Rows) -> np.ndarray:
        """-log pi(y | x) of each row alone, by the model's own logits."""
        found = []
        for row in rows:
            alone = {name: row[name] for name in ("prompt", "completion", "ended") if name in row}
            (one,) = tokenize_samples(load_samples([alone]), self.tokenizer)
            ids = torch.tensor([[*one.prompt_ids, *one.completions[0]]])
            with torch.no_grad():
                logps = model.eval()(input_ids=ids).logits[0, len(one.prompt_ids) - 1 : -1].log_softmax(-1)
            found.append(-float(logps.gather(1, ids[0, len(one.prompt_ids) :, None]).sum()))
        return np.array(found)


@pytest.fixture
def world(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> World:
    return World(tmp_path, tiny_tokenizer)


def some_samples(prompts: int = 4, most: int = 5) -> Rows:
    """Prompts with different numbers of samples of different lengths, some of them cut, all weighted."""
    return [
        {"prompt": f"q{x}{' please' * (x % 3)}:", "completion": f" yes {j * j}" + " no" * (j % 3)}
        | {"log_weight": ((7 * x + 3 * j) % 5) / 2 - 1, "ended": (x + j) % 3 > 0}
        for x in range(prompts)
        for j in range(1 + (x * 3) % most)
    ]


def by_hand(rows: Rows, nlls: np.ndarray) -> float:
    """The mean over prompts of the weighted mean of `nlls`."""
    means = []
    for prompt in dict.fromkeys(row["prompt"] for row in rows):
        at = [i for i, row in enumerate(rows) if row["prompt"] == prompt]
        means.append(np.average(nlls[at], weights=[math.exp(rows[i]["log_weight"]) for i in at]))
    return float(np.mean(means))


def log_of(trainer: Any, key: str | None = None) -> list[Any]:
    lines = [
        {k: v for k, v in line.items() if not k.endswith(("_runtime", "_per_second"))} for line in trainer.state.log_history
    ]
    return lines if key is None else [line[key] for line in lines if key in line]


# What is optimised


def atom_rows(prompt: str, toy: Toy, weights: Tensor) -> Rows:
    """A row for every completion of `toy`: its tokens 1 and 2 as letters, cut where it is cut there."""
    atoms = completions(toy.vocabulary, toy.length)
    return [
        {"prompt": prompt, "completion": "".join("?ab"[t] for t in atom if t != END), "ended": atom[-1] == END, "weight": w}
        for atom, w in zip(atoms, weights.tolist(), strict=True)
    ]


def test_the_fitted_policy_is_the_optimum_of_either_kl_as_its_weights_say(world: World) -> None:
    """One policy, one prompt a law: exact expectations, and 3000 draws; without weights it is what samples were drawn from."""
    toy = Toy(members=2, vocabulary=3, length=2, seed=3, prompts=1, beta=0.25)
    mixture = arithmetic(toy.logps[0], toy.weights[0])
    composed = geometric(toy.logps[0], toy.weights[0]).log_softmax(-1)
    forward_kl = solve_forward_kl(toy.reward[0], mixture, toy.beta).log_policy.exp()
    reverse_kl = solve_reverse_kl(toy.reward[0], composed, toy.beta).exp()
    drawn = torch.multinomial(mixture.exp(), 3000, True, generator=torch.Generator().manual_seed(0))
    weighted = forward(toy.reward[0][drawn], toy.beta)
    estimated = torch.bincount(drawn, weighted.log_weights.exp(), minlength=len(mixture))
    ratios = importance(toy.reward[0], toy.beta, log_weights=composed).log_weights.exp()
    laws = {"m": mixture.exp(), "f": forward_kl, "e": estimated, "r": ratios}
    rows = [row for name, weights in laws.items() for row in atom_rows(f"{name}:", toy, weights)]
    settings = {"per_device_train_batch_size": 4, "max_steps": 350, "learning_rate": 0.02, "logging_steps": 100}
    trainer = world.trainer(rows, lr_scheduler_type="cosine", optim="adamw_torch", adam_beta2=0.99, **settings)
    trainer.train()
    fitted = torch.from_numpy(np.exp(-world.nlls(trainer.model, rows))).view(len(laws), -1)
    found = dict(zip(laws, fitted, strict=True))
    assert total_variation(mixture.exp(), forward_kl) > 0.15 < total_variation(composed.exp(), reverse_kl)
    assert total_variation(found["f"], forward_kl) < 0.01 and total_variation(found["r"], reverse_kl) < 0.01
    assert total_variation(found["m"], mixture.exp()) < 0.01 and total_variation(found["m"], forward_kl) > 0.15
    assert total_variation(found["e"], forward_kl) < 0.04


@pytest.mark.parametrize("per_token", [False, True])
def test_the_loss_is_the_one_that_is_documented(world: World, per_token: bool) -> None:
    rows = some_samples()
    trainer = world.trainer(rows, length_normalise=per_token)
    nlls = world.nlls(trainer.model, rows)
    lengths = [len(row["completion"].encode()) + row["ended"] for row in rows]
    trainer.train()
    (line,) = (line for line in log_of(trainer) if "loss" in line)
    assert line["loss"] == pytest.approx(by_hand(rows, nlls / lengths if per_token else nlls), rel=1e-5)
    assert line["logps/weighted"] == pytest.approx(-by_hand(rows, nlls), rel=1e-5)
    alike = [row | {"log_weight": 0.0} for row in rows]
    assert line["logps/even"] == pytest.approx(-by_hand(alike, nlls), rel=1e-5) and set(METRICS) <= line.keys()


def gradient(world: World, rows: Rows, **changes: Any) -> tuple[float, Tensor]:
    """Loss and gradient of one pass over `rows`, before any step."""
    trainer = world.trainer(rows, **changes)
    size, dataset = trainer.args.per_device_train_batch_size, trainer.train_dataset
    total = 0.0
    for start in range(0, len(dataset), size):
        batch = [dataset[i] for i in range(start, min(start + size, len(dataset)))]
        loss = trainer.compute_loss(trainer.model.train(), trainer.data_collator(batch)) * len(batch) / len(dataset)
        loss.backward()
        total += float(loss.detach())
    return total, torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def test_neither_order_nor_rows_nor_batches_change_the_gradient(world: World) -> None:
    rows = some_samples()
    value, slope = gradient(world, rows)
    for order, changes in (
        (rows[::-1], {}),
        (rows, {"samples_per_row": 2}),
        (rows, {"samples_per_row": 1, "per_device_train_batch_size": 3}),
        (rows[1::2] + rows[::2], {"samples_per_row": 3, "per_device_train_batch_size": 1}),
    ):
        found, found_slope = gradient(world, order, **changes)
        assert found == pytest.approx(value, rel=1e-5)
        torch.testing.assert_close(found_slope, slope, rtol=1e-3, atol=1e-5 * float(slope.abs().max()))


def test_activation_checkpointing_changes_no_weight(world: World) -> None:
    found = []
    for on in (False, True):
        trainer = world.trainer(some_samples(), peft=tiny_lora(), activation_checkpointing=on)
        trainer.train()
        found.append(dict(trainer.model.state_dict()))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_a_prompt_counts_as_much_as_another_however_many_samples_it_has(world: World) -> None:
    few = [row for row in some_samples() if row["prompt"] == "q0:"]
    more = [{"prompt": "z:", "completion": f" {j}", "log_weight": 0.0} for j in range(9)]
    nlls = world.nlls(tiny_llama(world.tokenizer), few + more)
    value, _ = gradient(world, few + more, samples_per_row=4)
    assert len(few) == 1 and value == pytest.approx((nlls[0] + nlls[1:].mean()) / 2, rel=1e-5)


def test_a_prompt_is_passed_once_for_its_samples_and_rows_are_cut_evenly(world: World) -> None:
    rows = [{"prompt": f"{x}:", "completion": f" {j}"} for x in range(2) for j in range(9)]
    trainer = world.trainer(rows)
    assert [len(row.completions) for row in trainer.train_dataset.rows] == [4, 5, 4, 5]
    with counted_calls(LlamaForCausalLM) as calls:
        trainer.train()
    assert [shape[0] for shape in calls] == [4]


def test_filling_up_a_row_adds_nothing_even_where_a_token_is_impossible(world: World) -> None:
    prompts = tokenize_samples(load_samples(some_samples()), world.tokenizer)
    batch = RowCollator()([SampleRows(prompts, 8)[i] for i in (0, 1)])
    filled = batch["weights"] == 0
    assert filled.any() and (batch["even"][filled] == 0).all()
    first = prompts[0].completions[0][0]
    assert (batch["target_ids"] == first).sum() >= filled.sum(), "what fills up is a token that the prompt's samples have"


# What is measured and saved


def test_the_report_is_the_mean_over_prompts_and_agrees_with_evaluation(world: World) -> None:
    rows = some_samples()
    trainer = world.trainer(rows, rows, samples_per_row=2)
    report = likelihood_report(trainer, trainer.eval_dataset)
    expected = by_hand(rows, world.nlls(trainer.model, rows))
    assert report["nll"][0] == pytest.approx(expected, rel=1e-5) == trainer.evaluate()["eval_loss"]
    assert report["nll"][1] < report["nll"][0] < report["nll"][2] and len(report["values"]) == report["prompts"] == 4
    assert 1 <= report["effective"] <= report["samples"] / report["prompts"] and report["samples"] == len(rows)
    assert trainer.evaluate(rows[:1])["eval_loss"] == pytest.approx(world.nlls(trainer.model, rows[:1])[0], rel=1e-5)


@pytest.mark.parametrize("kind", ["weights", "adapter"])
def test_a_resumed_run_is_the_unbroken_run_to_the_last_bit(world: World, kind: str) -> None:
    settings = {"per_device_train_batch_size": 2, "num_train_epochs": 2, "logging_steps": 2, "samples_per_row": 2}
    steps = {
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "lr_scheduler_type": "cosine",
    }

    def trainer(name: str) -> Any:
        peft = tiny_lora(lora_dropout=0.1) if kind == "adapter" else None
        return world.trainer(some_samples(), some_samples(2), peft=peft, output_dir=str(world.path / name), **settings | steps)

    unbroken = trainer("unbroken")
    unbroken.train()
    for step in (3, 6):
        resumed = trainer(f"from-{step}")
        resumed.train(resume_from_checkpoint=str(world.path / "unbroken" / f"checkpoint-{step}"))
        assert same(dict(resumed.model.state_dict()), dict(unbroken.model.state_dict()))
        assert same(resumed.optimizer.state_dict(), unbroken.optimizer.state_dict())
        assert log_of(resumed) == log_of(unbroken)


# Refused


def test_what_cannot_be_trained_is_refused_in_one_line(world: World) -> None:
    rows = some_samples()
    refused: list[tuple[type[InputError], str, Any]] = [
        (ConfigError, "samples_per_row is 0", lambda: world.config(samples_per_row=0)),
        (ConfigError, "label_smoothing_factor has no effect", lambda: world.config(label_smoothing_factor=0.1)),
        (ConfigError, "max_length", lambda: world.config(max_length=1)),
        (ConfigError, "nothing to evaluate on", lambda: world.trainer(rows, eval_strategy="steps")),
        (DataError, "no sample of the train set .* within 4 tokens; raise", lambda: world.trainer(rows, max_length=4)),
        (DataError, "column completion: is missing", lambda: world.trainer([{"prompt": "a", "chosen": "b"}])),
        (ModelError, "do not fit the context", lambda: world.trainer(
            [{"prompt": "a", "completion": "b" * 300}], max_length=None)),
        (ModelError, "no such folder", lambda: world.trainer(rows, model=str(world.path / "absent"))),
    ]  # fmt: skip
    for kind, words, make in refused:
        with pytest.raises(kind, match=words) as error:
            make()
        assert "\n" not in str(error.value), words


def test_a_loss_that_is_not_finite_stops_with_its_rows_saved(world: World) -> None:
    class Poison(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            nn.init.constant_(kwargs["model"].lm_head.weight, math.nan)

    trainer = world.trainer(some_samples(), per_device_train_batch_size=2, callbacks=[Poison()])
    with pytest.raises(TrainingDivergedError, match="not finite at step 1"):
        trainer.train()
    kept = json.loads((world.path / "run" / "nonfinite_batch.json").read_text())
    assert kept["step"] == 1 and len(kept["rows"]) == 2


def test_a_folder_is_a_model_and_brings_its_tokenizer(world: World) -> None:
    folder = saved_llama(world.path / "base", world.tokenizer)
    trainer = LikelihoodTrainer(str(folder), world.config(max_steps=1), some_samples())
    trainer.train()
    assert trainer.state.global_step == 1
