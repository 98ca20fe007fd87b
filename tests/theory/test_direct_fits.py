"""Tabular policies fitted by the objectives themselves, against exact optima, two-stage fits and brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from polyref.errors import ConfigError, PolyrefError, ReferenceSetError
from polyref.objectives import doubly_robust_value, optimal_control, pair_loss, sigmoid
from polyref.references.compose import arithmetic
from polyref.theory.bandit import FiniteBandit, random_bandit
from polyref.theory.descent import minimise_policies
from polyref.theory.direct_fits import fit_doubly_robust, fit_policy, fit_variance_reduced
from polyref.theory.estimators import fit_tabular
from polyref.theory.preferences import bradley_terry, intransitive, pair_law
from polyref.theory.sampling import Pairs, count_wins, draw_pairs, draw_wins
from polyref.theory.solutions import forward_optimum, solve_forward_kl, solve_reverse_kl

AXES = [("geometric", "reverse"), ("arithmetic", "forward"), ("arithmetic", "reverse")]
every_axes = pytest.mark.parametrize("axes", AXES, ids=["reverse-geometric", "forward-arithmetic", "reverse-arithmetic"])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def world(members: int = 3, *, replicates: tuple[int, ...] = (4,), contexts: int = 3, actions: int = 4, seed: int = 0):
    """A bandit with a weight vector per context, and a law mu of actions (X, Y) in logs."""
    generator = seeded(seed)
    weights = torch.rand(contexts, members, generator=generator, dtype=torch.float64) + 0.2
    bandit = random_bandit(
        generator,
        contexts=contexts,
        actions=actions,
        references=members,
        beta=0.4,
        replicates=replicates,
        weights=weights / weights.sum(-1, keepdim=True),
    )
    log_mu = torch.randn(contexts, actions, generator=generator, dtype=torch.float64).log_softmax(-1)
    return bandit, log_mu


def tilted(bandit: FiniteBandit, rewards: Tensor, axes: tuple[str, str]) -> Tensor:
    """The exact optimum for `rewards`."""
    if axes == ("arithmetic", "forward"):
        return solve_forward_kl(rewards, bandit.mixture, bandit.beta).log_policy
    return solve_reverse_kl(rewards, bandit.geometric if axes[0] == "geometric" else bandit.mixture, bandit.beta)


def apart(one: Tensor, other: Tensor) -> float:
    """The largest total variation over replicates and contexts."""
    assert one.shape == other.shape
    return 0.5 * (one.exp() - other.exp()).abs().sum(-1).max().item()


def any_antisymmetric(bandit: FiniteBandit, seed: int) -> Tensor:
    contexts, actions, _ = bandit.size
    logits = torch.randn(contexts, actions, actions, generator=seeded(seed), dtype=torch.float64)
    return torch.sigmoid(logits - logits.mT)


# The minimisers of section 2 of the theory, in the population.


@every_axes
@pytest.mark.parametrize("members", [1, 2, 3, 4])
def test_sigmoid_and_robust_reach_the_optimum(axes, members):
    bandit, log_mu = world(members, seed=members)
    law, preference = pair_law(bandit.contexts, log_mu), bradley_terry(bandit.rewards)
    target = tilted(bandit, bandit.rewards, axes)
    assert apart(fit_policy(bandit, law * preference, sigmoid, *axes), target) < 1e-6
    flipped = 0.8 * preference + 0.2 * preference.mT
    assert apart(fit_policy(bandit, law * flipped, pair_loss("robust", bandit.beta, 0.2), *axes), target) < 1e-6
    assert apart(fit_policy(bandit, law * flipped, sigmoid, *axes), target) > 0.01
    assert apart(fit_policy(bandit, law * preference, pair_loss("smoothed", bandit.beta, 0.2), *axes), target) > 0.01


@every_axes
@pytest.mark.parametrize("members", [1, 3])
def test_ipo_reaches_the_optimum_of_winning_against_mu(axes, members):
    bandit, log_mu = world(members, seed=10 + members)
    preference = intransitive(bandit.rewards, 2.0, seeded(0))
    law = pair_law(bandit.contexts, log_mu, distinct=False)
    found = fit_policy(bandit, law * preference, pair_loss("ipo", bandit.beta), *axes)
    assert apart(found, tilted(bandit, (preference @ log_mu.exp()[..., None])[..., 0], axes)) < 1e-6


# Finite data.


@every_axes
def test_one_stage_is_the_maximum_likelihood_and_then_the_tilt(axes):
    bandit, log_mu = world(replicates=(), contexts=4, actions=5, seed=20)
    law, preference = pair_law(bandit.contexts, log_mu), intransitive(bandit.rewards, 1.0, seeded(1))
    wins = draw_wins(law, preference, 400, 25, seeded(2))
    two_stage = tilted(bandit, fit_tabular(wins, ridge=0.1), axes)
    assert apart(fit_policy(bandit, wins, sigmoid, *axes, ridge=0.1), two_stage) < 1e-6


@every_axes
def test_batched_is_one_by_one_and_data_of_another_context_changes_nothing(axes):
    bandit, log_mu = world(replicates=(), seed=21)
    wins = draw_wins(pair_law(bandit.contexts, log_mu), bradley_terry(bandit.rewards), 200, 5, seeded(3))
    together = fit_policy(bandit, wins, sigmoid, *axes, ridge=0.1)
    alone = torch.stack([fit_policy(bandit, one, sigmoid, *axes, ridge=0.1) for one in wins])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-7)
    changed = wins.clone()
    changed[:, 0] = 0
    moved = fit_policy(bandit, changed, sigmoid, *axes, ridge=0.1)
    torch.testing.assert_close(moved[:, 1:], together[:, 1:], rtol=0, atol=1e-7)
    anchor = bandit.geometric if axes[0] == "geometric" else bandit.mixture
    torch.testing.assert_close(moved[:, 0], anchor[0].expand(5, -1))


def test_ten_thousand_small_problems_settle():
    bandit, log_mu = world(replicates=(), contexts=10, actions=4, seed=22)
    wins = draw_wins(pair_law(bandit.contexts, log_mu), bradley_terry(bandit.rewards), 500, 1000, seeded(4))
    found = fit_policy(bandit, wins, sigmoid, ridge=0.01)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(1000, 10, dtype=torch.float64))


# With an auxiliary model.


def enumerated(law: Tensor, preference: Tensor) -> tuple[Pairs, Tensor, Tensor, Tensor]:
    """Every (context, pair, label, auxiliary pair) as one replicate: pairs, auxiliary actions (1, n, 1), shares (1, n)."""
    contexts, actions = law.shape[0], law.shape[-1]
    cells = list(itertools.product(range(actions), repeat=2))
    rows, shares = [], []
    for x, (i, j), z, (k, m) in itertools.product(range(contexts), cells, (0.0, 1.0), cells):
        rows.append((x, i, j, k, m, z))
        shares.append(law[x, i, j] * (preference[x, i, j] if z else preference[x, j, i]) * law[x, k, m] / law[x].sum())
    table = torch.tensor(rows, dtype=torch.float64).T[:, None]
    x, i, j, k, m = table[:5].long()
    return Pairs(x, i, j, table[5]), k[..., None], m[..., None], torch.stack(shares)[None]


@every_axes
@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
@pytest.mark.parametrize("control", [1.0, 0.5])
def test_no_auxiliary_model_moves_the_population_fit(axes, name, control):
    bandit, log_mu = world(replicates=(), seed=30)
    preference, loss = intransitive(bandit.rewards, 1.0, seeded(5)), pair_loss(name, bandit.beta)
    law = pair_law(bandit.contexts, log_mu)
    pairs, first, second, shares = enumerated(law, preference)
    plain = fit_policy(bandit, law * preference, loss, *axes)
    for seed in (0, 1):
        g = any_antisymmetric(bandit, seed)
        found = fit_variance_reduced(bandit, pairs, g, first, second, loss, *axes, control=control, shares=shares)
        assert apart(found[0], plain) < 1e-6


@every_axes
def test_pairs_without_control_are_their_wins(axes):
    bandit, log_mu = world(replicates=(6,), seed=31)
    pairs = draw_pairs(pair_law(bandit.contexts, log_mu), bradley_terry(bandit.rewards), 150, 6, seeded(6))
    g = any_antisymmetric(bandit, 2)
    drawn = (pairs.first[..., None], pairs.second[..., None])
    found = fit_variance_reduced(bandit, pairs, g, *drawn, sigmoid, *axes, control=0.0, ridge=0.1)
    expected = fit_policy(bandit, count_wins(pairs, 3, 4), sigmoid, *axes, ridge=0.1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_true_auxiliary_model_brings_fits_closer_under_misspecification():
    bandit, log_mu = world(replicates=(), contexts=1, seed=32)
    preference, law = intransitive(bandit.rewards, 4.0, seeded(7)), pair_law(bandit.contexts, log_mu)
    limit = fit_policy(bandit, law * preference, sigmoid)
    replicates, pairs, drawn = 400, 300, 8
    data = draw_pairs(law, preference, pairs, replicates, seeded(8))
    auxiliary = draw_pairs(law, preference, pairs * drawn, replicates, seeded(9))
    first, second = (a.view(replicates, pairs, drawn) for a in (auxiliary.first, auxiliary.second))
    control = optimal_control(drawn)
    reduced = fit_variance_reduced(bandit, data, preference, first, second, sigmoid, control=control, ridge=0.01)
    plain = fit_policy(bandit, count_wins(data, 1, 4), sigmoid, ridge=0.01)
    errors = [((fit.exp() - limit.exp()) ** 2).sum((-2, -1)) for fit in (reduced, plain)]
    gain = errors[1] - errors[0]
    assert gain.mean() > 4 * gain.std() / replicates**0.5


# Doubly robust.


@pytest.mark.parametrize("composition", ["geometric", "arithmetic"])
def test_doubly_robust_tilts_the_anchor_by_the_win_rate_if_one_model_is_right(composition):
    bandit, log_mu = world(replicates=(), seed=40)
    preference, wrong = intransitive(bandit.rewards, 1.0, seeded(10)), any_antisymmetric(bandit, 3)
    wrong_mu = torch.randn(3, 4, generator=seeded(11), dtype=torch.float64).log_softmax(-1)
    pairs, _, _, shares = enumerated(pair_law(bandit.contexts, log_mu, distinct=False), preference)
    target = tilted(bandit, (preference @ log_mu.exp()[..., None])[..., 0], (composition, "reverse"))

    def distance(g: Tensor, mu: Tensor) -> float:
        return apart(fit_doubly_robust(bandit, pairs, g, mu, composition, shares=shares)[0], target)

    assert distance(preference, wrong_mu) < 1e-6 and distance(wrong, log_mu) < 1e-6
    assert distance(wrong, wrong_mu) > 0.01


def test_doubly_robust_on_drawn_pairs_tilts_by_the_value_of_each_action():
    """The value is linear in the policy, so the optimum follows from those of the policies that play one action."""
    bandit, log_mu = world(replicates=(2,), seed=41)
    preference, g = intransitive(bandit.rewards, 1.0, seeded(12)), any_antisymmetric(bandit, 4)
    pairs = draw_pairs(pair_law(bandit.contexts, log_mu, distinct=False), preference, 60, 2, seeded(13))
    values = torch.zeros(2, 3, 4, dtype=torch.float64)
    for r, x, y in itertools.product(range(2), range(3), range(4)):
        own = pairs.contexts[r] == x
        i, j, z = pairs.first[r, own], pairs.second[r, own], pairs.z[r, own]
        ratios = [torch.where(a == y, -log_mu[x, a], torch.tensor(-math.inf, dtype=torch.float64)) for a in (i, j)]
        values[r, x, y] = doubly_robust_value(z, g[x, i, j], (g[x, y, i] + g[x, y, j]) / 2, *ratios).mean()
    assert apart(fit_doubly_robust(bandit, pairs, g, log_mu), tilted(bandit, values, AXES[0])) < 1e-7


# Edges.


def partly_supported() -> tuple[FiniteBandit, Tensor]:
    """Two references over five actions, none of which supports the last; the wins of the others."""
    logits = torch.randn(2, 5, 2, generator=seeded(50), dtype=torch.float64)
    logits[:, 4] = -math.inf
    rewards = torch.tensor([[0.1, 0.9, 0.4, 0.2, math.nan], [0.5, 0.1, 0.8, 0.3, math.inf]])
    bandit = FiniteBandit.tabular(rewards, logits.log_softmax(-2), beta=0.5)
    wins = bradley_terry(bandit.rewards)
    wins[:, 4] = wins[..., 4] = 0
    return bandit, wins


@every_axes
@pytest.mark.parametrize("ridge", [0.0, 1e-9])
def test_actions_without_support_keep_none(axes, ridge):
    bandit, wins = partly_supported()
    found = fit_policy(bandit, wins, sigmoid, *axes, ridge=ridge)
    assert found[:, 4].isneginf().all() and apart(found, tilted(bandit, bandit.rewards, axes)) < 1e-6
    wins[1, 4, 0] = 1
    with pytest.raises(ConfigError, match="no reference supports"):
        fit_policy(bandit, wins, sigmoid, *axes)


def test_a_member_without_mass_is_fine_in_the_mixture_and_removed_at_weight_zero():
    logps = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64).log().T[None]
    rewards = torch.tensor([[0.3, 0.6, 0.1]], dtype=torch.float64)
    bandit = FiniteBandit.tabular(rewards, logps, [0.6, 0.4], beta=0.5)
    found = fit_policy(bandit, bradley_terry(rewards), sigmoid, "arithmetic", "forward")
    assert apart(found, forward_optimum(bandit)) < 1e-6
    assert arithmetic(logps, [0.6, 0.4]).isfinite().all()
    with pytest.raises(ReferenceSetError, match="no mass"):
        fit_policy(bandit, bradley_terry(rewards), sigmoid)
    alone = FiniteBandit.tabular(rewards, logps, [0.0, 1.0], beta=0.5)
    assert apart(fit_policy(alone, bradley_terry(rewards), sigmoid), tilted(alone, rewards, AXES[0])) < 1e-6


def test_fits_without_a_minimum_say_so():
    bandit, _ = world(replicates=(), contexts=1, actions=3)
    always = torch.tensor([[[0.0, 5.0, 3.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0]]])
    hard = always + 0.2 * always.mT
    for wins, loss in ((always, sigmoid), (hard, pair_loss("robust", bandit.beta, 0.3))):
        with pytest.raises(PolyrefError, match=r"contexts? (did not settle|are unbounded)"):
            fit_policy(bandit, wins, loss)
    assert fit_policy(bandit, always, sigmoid, ridge=0.1).isfinite().all()
    with pytest.raises(PolyrefError, match="did not settle"):
        fit_policy(bandit, 0.3 * always + 0.1, pair_loss("hinge", bandit.beta))


def test_any_objective_of_a_policy_can_be_minimised():
    """Of a non-convex one, Newton steps through |Hessian| find a stationary point that is no maximum."""
    target = torch.randn(3, 2, 5, generator=seeded(60), dtype=torch.float64).log_softmax(-1)
    found = minimise_policies(lambda p: (p.exp() - target.exp()).abs().pow(2).sum(-1), torch.zeros(3, 2, 5).double())
    assert apart(found, target) < 1e-6


def test_bad_input_is_refused():
    bandit, log_mu = world(replicates=())
    wins = torch.ones(3, 4, 4)
    with pytest.raises(ConfigError, match=r"wins \(2, 4, 4\) are not counts \(\.\.\., 3, 4, 4\)"):
        fit_policy(bandit, wins[:2], sigmoid)
    with pytest.raises(ConfigError, match="not counts"):
        fit_policy(bandit, -wins, sigmoid)
    with pytest.raises(ConfigError, match="ridge is -1"):
        fit_policy(bandit, wins, sigmoid, ridge=-1)
    with pytest.raises(ConfigError, match="no geometric anchor"):
        fit_policy(bandit, wins, sigmoid, "geometric", "forward")
    pairs = draw_pairs(pair_law(bandit.contexts, log_mu), bradley_terry(bandit.rewards), 10, 2, seeded(0))
    with pytest.raises(ConfigError, match=r"auxiliary actions \(2, 9, 1\) .* do not fit pairs \(2, 10\)"):
        fit_variance_reduced(bandit, pairs, wins / 2, *(a[:, :9, None] for a in pairs[1:3]), sigmoid)
    drawn = (pairs.first[..., None], pairs.second[..., None])
    for g, what in ((wins, r"P \+ P\^T = 1"), (wins[:2] / 2, r"g \(2, 4, 4\) is not \(3, 4, 4\)")):
        with pytest.raises(ConfigError, match=what):
            fit_variance_reduced(bandit, pairs, g, *drawn, sigmoid)
        with pytest.raises(ConfigError, match=what):
            fit_doubly_robust(bandit, pairs, g, log_mu)


def test_pairs_that_do_not_fit_are_refused_by_both_fits():
    """The last action has no support, and four pairs a replicate compare the others."""
    bandit, _ = partly_supported()
    index = torch.tensor([[0, 1, 2, 3]]).expand(2, 4)
    good = Pairs(index % 2, index, (index + 1) % 4, torch.tensor([[1.0, 0.0, 1.0, 0.5]]).double().expand(2, 4))
    g, log_mu = torch.full((2, 5, 5), 0.5, dtype=torch.float64), bandit.mixture

    def fits(pairs: Pairs, *, shares: Tensor | None = None, mu: Tensor = log_mu, drawn: Tensor | None = None) -> list[Tensor]:
        drawn = (good.first if drawn is None else drawn)[..., None]
        other = good.second[..., None]
        return [
            fit_variance_reduced(bandit, pairs, g, drawn, other, sigmoid, ridge=0.1, shares=shares),
            fit_doubly_robust(bandit, pairs, g, mu, shares=shares),
        ]

    assert all(fit[..., 4].isneginf().all() for fit in fits(good))

    def changed(name: str, at: tuple[int, int], value: float) -> Pairs:
        part = getattr(good, name).clone()
        part[at] = value
        return good._replace(**{name: part})

    for bad, what in (
        (changed("first", (1, 2), 4), r"first \(2, 4\) of the pairs: pair \(1, 2\) has an action that no reference supports"),
        (changed("second", (0, 1), 4), "no reference supports"),
        (changed("first", (0, 0), 5), r"first \(2, 4\) of the pairs: holds what is no index below 5"),
        (changed("contexts", (0, 0), -1), "no index below 2"),
        (changed("z", (0, 0), math.nan), r"labels z are not in \[0, 1\]"),
        (good._replace(first=good.first[:, :3]), "do not fit each other"),
    ):
        with pytest.raises(ConfigError, match=what):
            fits(bad)
        with pytest.raises(ConfigError, match=what):
            fit_doubly_robust(bandit, bad, g, log_mu)
    for shares, what in ((torch.ones(3), "do not fit"), (-torch.ones(2, 4), "negative"), (torch.ones(2, 4) / 0, "finite")):
        with pytest.raises(ConfigError, match=what):
            fits(good, shares=shares)
        with pytest.raises(ConfigError, match=what):
            fit_doubly_robust(bandit, good, g, log_mu, shares=shares)
    with pytest.raises(ConfigError, match=r"auxiliary \(2, 4, 1\) of the pairs: pair .* no reference supports"):
        fits(good, drawn=changed("first", (0, 3), 4).first)
    narrow = torch.tensor([[1.0, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0]]).double().log()
    with pytest.raises(ConfigError, match=r"log_mu \(2, 5\): pair \(0, 2\) has an action of log-probability -inf"):
        fits(good, mu=narrow)
    with pytest.raises(ConfigError, match=r"log_mu \(5,\) is not"):
        fits(good, mu=narrow[0])
    with pytest.raises(ConfigError, match="one of those a replicate"):
        fit_doubly_robust(bandit, good, g.expand(3, 2, 5, 5), log_mu)
    unshared = torch.tensor([[1.0, 1.0, 0.0, 1.0]]).double().expand(2, 4)
    odd = changed("first", (1, 2), 4)
    torch.testing.assert_close(fits(odd, shares=unshared)[1], fits(good, shares=unshared)[1])
