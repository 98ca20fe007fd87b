"""Doubly robust training: what a step's loss and gradient are on average, by enumeration of one-token completions."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fakes import auxiliary_columns, byte_tokenizer, counted_calls, pair_rows, saved_llama, tiny_llama
from polyref import PreferenceConfig, PreferenceTrainer, Reference, ReferenceSet
from polyref.errors import ConfigError, ReferenceSetError
from polyref.training.dataset import ScoredPair
from polyref.types import PreferenceRecord, TokenizedPair

TOKENS, PROMPT, BETA = 5, (3, 4), 0.3


def antisymmetric(seed: int) -> Tensor:
    logits = 2 * torch.randn(TOKENS, TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.sigmoid(logits - logits.T)


TRUTH, WRONG = antisymmetric(0), antisymmetric(1)


class World:
    """A policy, a reference and a sampling policy over TOKENS completions of one token, and the trainer's own step."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.path, self.tokenizer = path, tokenizer
        self.policy, reference, sampler = (tiny_llama(tokenizer, seed=seed, vocab_size=TOKENS) for seed in range(3))
        self.log_anchor, self.log_q = self.logps(reference).detach(), self.logps(sampler).detach()
        self.trainer = self.make(self.policy, None, Reference(reference), Reference(sampler))

    def make(self, policy: Any, rows: Any, references: Any, sampling: Any, **changes: Any) -> PreferenceTrainer:
        usual = {
            "output_dir": str(self.path / "run"),
            "cache_dir": str(self.path / "cache"),
            "objective": "doubly_robust",
            "importance_clip": None,
            "beta": BETA,
            "per_device_train_batch_size": 4,
            "num_train_epochs": 1,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        args = PreferenceConfig(**usual | changes)
        torch.manual_seed(0)
        return PreferenceTrainer(policy, references, args, rows, None, self.tokenizer, sampling_policy=sampling)

    def logps(self, model: Any) -> Tensor:
        return model(input_ids=torch.tensor([PROMPT])).logits[0, -1].double().log_softmax(-1)

    def pair(self, first: int, second: int, z: int, drawn: tuple[int, int], g: Tensor) -> ScoredPair:
        completions = (first, second, *drawn)
        record = PreferenceRecord(
            "p",
            "first",
            "second",
            chosen_probability=float(z),
            predicted_probability=float(g[first, second]),
            auxiliary_1=("a",),
            auxiliary_2=("b",),
            auxiliary_probability=(float(g[drawn]),),
        )
        ids = tuple((c,) for c in completions)
        tokens = TokenizedPair(PROMPT, ids[0], ids[1], auxiliary_ids=ids[2:], auxiliary_cut=(True, True))
        anchor, sampling = (tuple(law[list(completions)].tolist()) for law in (self.log_anchor, self.log_q))
        return ScoredPair(tokens, record, anchor, 0, sampling)

    def expectation(self, data_law: Tensor, g: Tensor, *, distinct: bool = False) -> tuple[float, Tensor]:
        """The mean of the step's loss, and its gradient, over all pairs from `data_law`, labels from TRUTH and pairs from q."""
        q, everything = self.log_q.exp(), list(itertools.product(range(TOKENS), repeat=2))
        cells = [cell for cell in everything if not distinct or cell[0] != cell[1]]
        pairs, chances = [], []
        for (i, j), drawn, z in itertools.product(cells, cells, (0, 1)):
            pairs.append(self.pair(i, j, z, drawn, g))
            chances.append(data_law[i] * data_law[j] * q[drawn[0]] * q[drawn[1]] * (TRUTH[i, j] if z else TRUTH[j, i]))
        chance = torch.stack(chances) / torch.stack(chances).sum()
        found: list[Tensor] = []
        objective: Any = self.trainer.step_objective

        class Seen:
            columns = objective.columns

            def __call__(self, step: Any) -> Any:
                losses, values = objective(step)
                found.append(losses)
                return losses, values

        self.trainer.step_objective = Seen()  # type: ignore[assignment]
        self.trainer.model.train()
        self.trainer.compute_loss(self.trainer.model, self.trainer.data_collator(pairs))
        self.trainer.step_objective = objective
        return self.slope((found[0].double() * chance).sum())

    def target(self, preference: Tensor) -> tuple[float, Tensor]:
        """-(win rate of the policy over q) + beta KL(policy || anchor), and its gradient."""
        log_pi = self.logps(self.policy)
        win = log_pi.exp() @ preference @ self.log_q.exp()
        return self.slope(BETA * (log_pi.exp() * (log_pi - self.log_anchor)).sum() - win)

    def slope(self, value: Tensor) -> tuple[float, Tensor]:
        self.policy.zero_grad()
        value.backward()
        return value.item(), torch.cat([p.grad.flatten() for p in self.policy.parameters() if p.grad is not None])


@pytest.fixture
def world(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> World:
    return World(tmp_path, tiny_tokenizer)


def assert_same(found: tuple[float, Tensor], expected: tuple[float, Tensor]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    assert (found[1] - expected[1]).norm() < 2e-4 * expected[1].norm()


def test_the_step_is_right_if_the_sampling_policy_or_the_auxiliary_model_is(world: World) -> None:
    expected, other = world.target(TRUTH), torch.tensor([0.1, 0.4, 0.2, 0.1, 0.2], dtype=torch.float64)
    assert expected[1].norm() > 1e-2
    assert_same(world.expectation(world.log_q.exp(), WRONG), expected)
    assert_same(world.expectation(other, TRUTH), expected)
    assert abs(world.expectation(other, WRONG)[0] - expected[0]) > 1e-2, "both wrong"


def test_leaving_equal_completions_out_scales_the_gradient_at_a_prompt(world: World) -> None:
    q, (_, expected) = world.log_q.exp(), world.target(TRUTH)
    _, found = world.expectation(q, WRONG, distinct=True)
    assert (found * (1 - q.square().sum()) - expected).norm() < 2e-4 * expected.norm()


def test_an_anchor_known_up_to_a_factor_gives_the_same_gradient(world: World) -> None:
    q = world.log_q.exp()
    before, slope = world.expectation(q, WRONG)
    world.log_anchor = world.log_anchor + 7
    after, again = world.expectation(q, WRONG)
    assert after == pytest.approx(before - 7 * BETA, rel=1e-4) and (again - slope).norm() < 1e-3 * slope.norm()


# The trainer around it.


def rows(count: int = 8) -> list[dict[str, Any]]:
    return pair_rows(count, **auxiliary_columns(2))


def test_the_sampling_policy_scores_all_completions_once_through_the_cache(world: World) -> None:
    folder = saved_llama(world.path / "sampler", world.tokenizer, seed=3)
    trainer = world.make(tiny_llama(world.tokenizer), rows(), None, Reference(folder))
    again = world.make(tiny_llama(world.tokenizer), rows(), Reference(folder), Reference(folder))
    for pair, other in zip(trainer.train_dataset.pairs, again.train_dataset.pairs, strict=True):
        assert len(pair.sampling) == 6 and pair.sampling == other.sampling == other.anchor != pair.anchor
    mixture = ReferenceSet((Reference(folder), Reference(tiny_llama(world.tokenizer, seed=4))), composition="arithmetic")
    mixed = world.make(tiny_llama(world.tokenizer), rows(), None, mixture)
    assert mixed.train_dataset.pairs[0].sampling != trainer.train_dataset.pairs[0].sampling
    with counted_calls() as calls:
        again.train()
    assert [count for count, _ in calls] == [4, 4], "a step calls the policy alone"


def test_a_log_line_holds_value_divergence_and_how_far_to_trust_the_weights(world: World) -> None:
    sampler = Reference(tiny_llama(world.tokenizer, seed=3))
    start = world.make(tiny_llama(world.tokenizer), rows(4), None, Reference(tiny_llama(world.tokenizer)))
    start.train()
    (line, *_) = start.state.log_history
    assert line["dr/weight"] == pytest.approx(1, abs=1e-3) and line["dr/ess"] == pytest.approx(1, abs=1e-3)
    assert line["dr/value"] == pytest.approx(0.5, abs=1e-3) and line["dr/clip_share"] == 0.0
    assert line["dr/kl"] == pytest.approx(0.0, abs=1e-3)
    clipped = world.make(tiny_llama(world.tokenizer), rows(4), None, sampler, importance_clip=2.0)
    clipped.train()
    (line, *_) = clipped.state.log_history
    pairs = clipped.train_dataset.pairs
    log_w = np.array([p.anchor for p in pairs]) - np.array([p.sampling for p in pairs])  # at the start policy is anchor
    weights = np.minimum(np.exp(log_w), 2.0)
    assert line["dr/clip_share"] == pytest.approx((log_w > np.log(2)).mean()) and line["dr/clip_share"] > 0
    assert line["dr/weight"] == pytest.approx(weights.mean(), rel=1e-3)
    assert line["dr/ess"] == pytest.approx(weights.sum() ** 2 / (weights.size * (weights**2).sum()), rel=1e-3)


def test_training_raises_the_estimated_value(world: World) -> None:
    start = Reference(tiny_llama(world.tokenizer))
    trainer = world.make(tiny_llama(world.tokenizer), rows(), None, start, num_train_epochs=8, beta=0.05, learning_rate=1e-3)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.02


def test_a_resumed_run_is_the_unbroken_run_to_the_last_bit(world: World) -> None:
    def run(name: str, **how: Any) -> tuple[Any, Tensor]:
        made = world.make(
            tiny_llama(world.tokenizer),
            rows(10),
            None,
            Reference(tiny_llama(world.tokenizer)),
            output_dir=str(world.path / name),
            num_train_epochs=2,
            save_strategy="steps",
            save_steps=2,
            logging_steps=2,
            importance_clip=3.0,
        )
        made.train(**how)
        timeless = ("_runtime", "_per_second")
        lines = [{k: v for k, v in line.items() if not k.endswith(timeless)} for line in made.state.log_history]
        return lines, torch.cat([p.detach().flatten() for p in made.model.parameters()])

    lines, weights = run("unbroken")
    again, resumed = run("resumed", resume_from_checkpoint=str(world.path / "unbroken" / "checkpoint-2"))
    assert torch.equal(weights, resumed) and lines == again


def test_a_sampling_policy_that_reads_other_tokens_is_refused_in_one_line(world: World) -> None:
    merging = byte_tokenizer(merges=[("n", "o")])
    stranger = Reference(tiny_llama(merging, seed=3), tokenizer=merging, name="stranger")
    known = Reference(tiny_llama(world.tokenizer, seed=3), name="known")
    for sampling in (stranger, ReferenceSet((known, stranger), composition="arithmetic")):
        with pytest.raises(
            ReferenceSetError, match="row 1: sampling policy stranger reads completions as other tokens"
        ) as error:
            world.make(tiny_llama(world.tokenizer), rows(), known, sampling)
        assert "\n" not in str(error.value)
        assert not (world.path / "cache").exists(), "refused before anything is scored"
    world.make(tiny_llama(world.tokenizer), rows(), stranger, known, max_steps=1).train()
    unused = ReferenceSet((known, stranger), weights=(1.0, 0.0), composition="arithmetic")
    found = [world.make(tiny_llama(world.tokenizer), rows(), known, sampling) for sampling in (known, unused)]
    assert found[0].train_dataset.pairs[0].sampling == found[1].train_dataset.pairs[0].sampling


def test_a_sampling_policy_may_have_another_template_and_padding_token(world: World) -> None:
    other = byte_tokenizer(chat_template=None)
    other.pad_token = other.eos_token
    model = tiny_llama(world.tokenizer, seed=3)
    found = [
        world.make(tiny_llama(world.tokenizer), rows(), None, Reference(model, tokenizer=tokenizer))
        for tokenizer in (None, other)
    ]
    assert [pair.sampling for pair in found[0].train_dataset.pairs] == [p.sampling for p in found[1].train_dataset.pairs]


def test_the_sampling_policy_is_named_where_it_is_used_and_is_a_law(world: World) -> None:
    one, two = (Reference(tiny_llama(world.tokenizer, seed=seed)) for seed in (1, 2))
    cases: tuple[tuple[Any, dict[str, Any], str], ...] = (
        (None, {}, "objective doubly_robust needs a sampling_policy; name"),
        (one, {"objective": "plain", "importance_clip": 10.0}, "sampling_policy has no effect with objective plain; leave"),
        (ReferenceSet((one, two)), {}, "is known up to a factor only; draw from one model"),
    )
    for sampling, changes, words in cases:
        with pytest.raises(ConfigError, match=words) as error:
            world.make("no/such-model", rows(), None, sampling, **changes)
        assert "\n" not in str(error.value)
