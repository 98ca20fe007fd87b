"""Ensembles and last-layer features: what they are unsure of, against the theory's own functions, and pessimism."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from fakes import counted_calls
from polyref.errors import ConfigError, InputError, ModelError
from polyref.rewards.cached import cached
from polyref.rewards.ensemble import RewardEnsemble
from polyref.rewards.functions import NamedReward, from_function, plain_text
from polyref.rewards.pessimism import UncertainReward, pessimistic
from polyref.rewards.protocols import Reward
from polyref.rewards.reward_model import RewardModel
from polyref.rewards.rules import length
from polyref.rewards.uncertainty import FeatureUncertainty, inverse_norm, pair_covariance
from polyref.theory import gshf
from polyref.types import Text

TEXTS = ["", "a", "bcd", "aabb ccdd", "dddd"]
PROMPTS = ["x"] * len(TEXTS)


def times(factor: float, shift: float = 0.0) -> NamedReward:
    """factor len(y) + shift."""
    return from_function(lambda _, y: factor * len(plain_text(y)) + shift, f"times {factor:g}", f"times {factor!r} {shift!r}")


class Linear:
    """<theta, phi>, phi(x, y) the numbers of a, b, c and d in y."""

    name, theta = "linear", torch.tensor([1.0, -0.5, 0.25, 2.0], dtype=torch.float64)

    def __init__(self, fingerprint: str | None = None) -> None:
        self.fingerprint = fingerprint

    def features(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Tensor:
        counts = [[plain_text(y).count(letter) for letter in "abcd"] for y in completions]
        return torch.tensor(counts, dtype=torch.float64).reshape(len(prompts), 4)

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Tensor:
        return self.features(prompts, completions) @ self.theta


FIRST, SECOND = ["a", "ab", "abc", "aab"], ["b", "ba", "ba", "bbb"]


def fitted(**changes: object) -> FeatureUncertainty:
    """Pairs that compare a with b, and once say something of c; never of d."""
    return FeatureUncertainty.fit(Linear("linear 1"), ["x"] * 4, FIRST, SECOND, **changes)  # type: ignore[arg-type]


def test_moments_are_those_of_the_members():
    ensemble = RewardEnsemble((times(1), times(2), times(4.5)))
    values = np.array([[len(text) * factor for factor in (1, 2, 4.5)] for text in TEXTS])
    mean, std = ensemble.moments(PROMPTS, TEXTS)
    assert ensemble.values(PROMPTS, TEXTS).tolist() == values.tolist()
    np.testing.assert_allclose(mean.numpy(), values.mean(-1), rtol=1e-15)
    np.testing.assert_allclose(std.numpy(), values.std(-1, ddof=1), rtol=1e-14)
    assert torch.equal(ensemble(PROMPTS, TEXTS), mean) and mean.dtype == std.dtype == torch.float64
    assert ensemble([], []).shape == ensemble.moments([], []).std.shape == (0,)


def test_pessimism_changes_which_completion_is_best():
    sure, unsure = RewardEnsemble((times(1), times(1))), RewardEnsemble((times(-1), times(3)))
    assert torch.equal(pessimistic(sure, 5)(PROMPTS, TEXTS), sure(PROMPTS, TEXTS))
    assert torch.equal(pessimistic(unsure, 0)(PROMPTS, TEXTS), sure(PROMPTS, TEXTS))
    reward: Reward = pessimistic(unsure, 2)
    assert reward.name == "ensemble - 2 std"
    expected = [len(text) * (1 - 2 * math.sqrt(8)) for text in TEXTS]
    np.testing.assert_allclose(reward(PROMPTS, TEXTS).numpy(), expected, rtol=1e-15)
    assert reward(PROMPTS, TEXTS).argmax() == 0 != sure(PROMPTS, TEXTS).argmax()


def test_members_that_differ_by_a_shift_agree_once_centred():
    ensemble = RewardEnsemble((times(1), times(1, shift=10), times(1, shift=-3)), name="shifted")
    assert ensemble.moments(PROMPTS, TEXTS).std.min() > 5
    centred = ensemble.centred_on(PROMPTS, TEXTS)
    assert centred.values(PROMPTS, TEXTS).mean(0).abs().max() < 1e-14 and centred.name == "shifted"
    assert centred.moments(PROMPTS, TEXTS).std.max() < 1e-14
    assert torch.equal(centred.centred_on(PROMPTS, TEXTS).values(PROMPTS, TEXTS), centred.values(PROMPTS, TEXTS))
    with pytest.raises(ConfigError, match="^shifted: no completions to centre on"):
        ensemble.centred_on([], [])


def test_an_ensemble_refuses_too_few_members_and_bad_values():
    for members in ((), (times(1),)):
        with pytest.raises(ConfigError, match=f"^ensemble: {len(members)} members tell no uncertainty; give at least 2"):
            RewardEnsemble(members)
    with pytest.raises(ConfigError, match="1 offsets for 2 members"):
        RewardEnsemble((times(1), times(2)), offsets=(0.0,))
    bad = from_function(lambda _, y: math.inf if y == "a" else 0.0, "bad")
    with pytest.raises(ModelError, match="^bad, row 2: gave inf as reward"):
        RewardEnsemble((times(1), bad))(PROMPTS, TEXTS)
    with pytest.raises(InputError, match="^ensemble: 1 completions for 2 prompts"):
        RewardEnsemble((times(1), times(2)))(["x", "x"], ["a"])


@pytest.mark.parametrize("k", [-0.1, math.nan, math.inf])
def test_pessimism_is_a_finite_amount(k: float):
    with pytest.raises(ConfigError, match=f"^pessimistic: k is {k}; give a finite number of at least 0"):
        pessimistic(fitted(), k)


def test_the_covariance_and_the_norm_are_the_theorys():
    """On one context with every completion an action: the lab's S and bonus are ours."""
    texts = [*FIRST, *SECOND, "d"]
    phi = Linear().features(["x"] * 9, texts)
    wins = torch.zeros(1, 9, 9, dtype=torch.float64)
    wins[0, range(4), range(4, 8)] = 1
    fit = fitted(ridge=0.5, nu=phi[3])
    matrix = gshf.covariance(wins, phi[None], ridge=0.5)
    torch.testing.assert_close(fit.matrix, matrix, rtol=0, atol=1e-14)
    bonus = gshf.bonus(phi[None], phi[3], matrix, scale=1.0)[0]
    torch.testing.assert_close(fit.uncertainty(["x"] * 9, texts), bonus, rtol=1e-13, atol=1e-14)
    direct = ((phi - phi[3]) @ torch.linalg.inv(fit.matrix) * (phi - phi[3])).sum(-1).sqrt()
    torch.testing.assert_close(bonus, direct, rtol=1e-13, atol=1e-14)


def test_what_no_pair_compared_is_what_it_is_unsure_of():
    nu = torch.zeros(4)
    fit = FeatureUncertainty.fit(Linear(), ["x"] * 3, ["a", "aa", "c"], ["", "", ""], ridge=1e-3, nu=nu)
    found = fit.uncertainty(["x"] * 3, ["aaaa", "cccc", "dddd"])
    torch.testing.assert_close(found, 4 / torch.tensor([5.001, 1.001, 0.001], dtype=torch.float64).sqrt(), rtol=1e-12, atol=0)
    reward = pessimistic(fit, 1.0)
    assert Linear()(["x"] * 2, ["aaaa", "dddd"]).argmax() == 1 and reward(["x"] * 2, ["aaaa", "dddd"]).argmax() == 0
    same = fit.moments(PROMPTS, TEXTS)
    torch.testing.assert_close(reward(PROMPTS, TEXTS), same.mean - same.std, rtol=0, atol=0)


def test_nu_is_the_mean_feature_unless_given():
    both = Linear().features(["x"] * 8, FIRST + SECOND)
    assert torch.equal(fitted().nu, both.mean(0))
    nu = torch.tensor([1.0, 2, 3, 4])
    assert fitted(nu=nu).uncertainty(["x"], ["abbcccdddd"]).tolist() == [0]
    none = FeatureUncertainty.fit(Linear(), [], [], [], ridge=4.0, nu=torch.zeros(4))
    assert none.uncertainty(["x"], ["aaabbbb"]).tolist() == [2.5]


def test_bad_features_and_settings_are_one_line():
    for changes, message in (
        ({"ridge": 0.0}, "pair_covariance: ridge is 0.0; give a finite value above 0"),
        ({"ridge": math.nan}, "pair_covariance: ridge is nan"),
        ({"nu": torch.zeros(3)}, r"linear: nu, of shape \(3,\), is no finite feature of 4 numbers"),
        ({"nu": torch.full((4,), math.nan)}, r"linear: nu, of shape \(4,\), is no finite feature"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}"):
            fitted(**changes)
    with pytest.raises(ConfigError, match="^linear: nu, .* is no finite feature of 4 numbers; give pairs"):
        FeatureUncertainty.fit(Linear(), [], [], [])
    with pytest.raises(ConfigError, match=r"^pair_covariance: features have shapes \(2, 4\) and \(3, 4\)"):
        pair_covariance(torch.zeros(2, 4), torch.zeros(3, 4))
    with pytest.raises(ConfigError, match="^inverse_norm: S is not positive definite; raise the ridge"):
        inverse_norm(torch.zeros(1, 2), torch.zeros(2), -torch.eye(2))

    class Broken(Linear):
        def features(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Tensor:
            phi = super().features(prompts, completions)
            return torch.where(phi == 3, math.nan, phi) if phi.sum() else phi[:0]

    with pytest.raises(ModelError, match="^linear, row 2: gave a feature that is not finite"):
        FeatureUncertainty.fit(Broken(), ["x"], ["a"], ["bbb"])
    with pytest.raises(ModelError, match=r"^linear: gave features of shape \(0, 4\) for 2 rows"):
        FeatureUncertainty.fit(Broken(), ["x"], [""], [""])


def test_uncertain_rewards_go_through_the_cache(tmp_path: Path):
    """Each has a fingerprint that tells it from every other, and none where what it is made of has none."""
    ensemble = RewardEnsemble((times(1), times(2)))
    shifted = ensemble.centred_on(PROMPTS, TEXTS)
    uncertain: list[UncertainReward] = [ensemble, shifted, fitted(), fitted(ridge=2.0), fitted(nu=torch.zeros(4))]
    rewards: list[Reward] = [pessimistic(reward, k) for reward in uncertain for k in (0, 0.5)]
    for reward in [ensemble, shifted, fitted(), *rewards]:
        for misses in (len(TEXTS), 0):
            through = cached(reward, tmp_path)
            assert torch.equal(through(PROMPTS, TEXTS), reward(PROMPTS, TEXTS)) and through.misses == misses
    assert len(list(tmp_path.iterdir())) == 3 + len(rewards)
    nameless = RewardEnsemble((length(), from_function(lambda *_: 0.0, "f")))
    assert nameless.fingerprint is pessimistic(nameless, 1).fingerprint is None
    assert FeatureUncertainty.fit(Linear(), ["x"], ["a"], ["b"]).fingerprint is None


def test_reward_models_have_all_that_is_needed(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast):
    """Two seeds of a network: an ensemble, its members through the cache, and the uncertainty of the features of one."""

    def reward_model(seed: int) -> RewardModel:
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 1}
        config = LlamaConfig(vocab_size=len(tiny_tokenizer), pad_token_id=0, initializer_range=0.3, **sizes)
        return RewardModel(LlamaForSequenceClassification(config), tiny_tokenizer, name=f"seed {seed}", device="cpu")

    models = [reward_model(seed) for seed in (0, 1)]
    prompts, completions = [*PROMPTS, "another?"], [*TEXTS, "a"]
    plain = RewardEnsemble(tuple(models))
    through = RewardEnsemble(tuple(cached(model, tmp_path) for model in models))
    mean, std = plain.moments(prompts, completions)
    with counted_calls(LlamaForSequenceClassification) as calls:
        for _ in range(2):
            assert all(map(torch.equal, through.moments(prompts, completions), (mean, std)))
        scored = len(calls)
        RewardEnsemble(tuple(cached(model, tmp_path) for model in models))(prompts, completions)
        assert len(calls) == scored > 0
    assert std.min() > 0 and plain.fingerprint == through.fingerprint

    fit = FeatureUncertainty.fit(models[0], prompts[:3], completions[:3], completions[2:5], ridge=0.1)
    bold, careful = (pessimistic(fit, c)(prompts, completions) for c in (0.0, 1.0))
    torch.testing.assert_close(bold, models[0](prompts, completions), rtol=0, atol=0)
    torch.testing.assert_close(bold - careful, fit.uncertainty(prompts, completions), rtol=1e-12, atol=1e-12)
    assert (bold > careful).all()
    with counted_calls(LlamaForSequenceClassification) as calls:
        models[0](prompts, completions)
        once = len(calls)
        moments = fit.moments(prompts, completions)
        assert len(calls) == 2 * once, "one pass for rewards and features"
    assert torch.equal(moments.mean, bold) and torch.equal(moments.std, fit.uncertainty(prompts, completions))
