"""Finite-sample bounds for plug-in policies, with every constant explicit: what `polyref plan` calls the bound.

The claims are the papers': 1/n for the reverse-KL gap and 1/sqrt(n) for the forward-KL one, with log of the class size and a
coverage constant ([MR] arXiv 2502.01203), and a pessimistic 1/sqrt(n) that needs coverage of the optimum alone ([IT] arXiv
2312.11456). The constants are derived here, as follows, and are not the papers'.

Setting. n independent pairs: x ~ rho, y1, y2 ~ mu(.|x) (or the same conditioned on y1 != y2, which only helps), label
z ~ Bernoulli(s(h*)), h = r(y1) - r(y2), |h| <= R for every reward of the class, which holds r*. r^ is the maximum-likelihood
reward in the class, D = h^ - h*, kappa = s'(R) the least slope of the logistic function s over [-R, R].

1. Likelihood. For one r let L = 1/2 sum_i log(p_r/p_r*)(z_i). Then E exp(L) = (E rho_r)^n with the Bhattacharyya coefficient
   rho_r = sqrt(s(h)s(h*)) + sqrt(s(-h)s(-h*)) = exp(-J), J the midpoint Jensen gap of f(h) = log cosh(h/2), and
   f'' = s' >= kappa gives J >= kappa D^2/8. Markov's inequality and a union over the class: with probability 1 - delta every r
   has L <= n log E rho_r + log(|class|/delta) <= -n E[1 - exp(-kappa D^2/8)] + log(|class|/delta), and r^ has L >= 0.
2. Linearised. u = kappa D^2/8 <= U = kappa R^2/2 as |D| <= 2R, and 1 - exp(-u) >= u (1 - exp(-U))/U, so
   E D^2 <= c(R) log(|class|/delta)/n with c(R) = 8 U/(kappa (1 - exp(-U))), between 8/kappa and 9/kappa.
3. Linear classes <theta, phi>, |phi| <= 1, |theta| <= R/2: apply 1 to an e-cover of the ball, at most (1 + R/e)^d points, at
   the point nearest to theta^, whose L is at least -n e and whose D is within 2e of D^. With e = d/n:
   sqrt(E D^2) <= sqrt(c(R) (d log(1 + R n/d) + d + log(1/delta))/n) + 2d/n.
   Tables, every reward of X contexts and Y actions with range at most R in each context, are no such class (one-hot features
   have |theta| up to R sqrt(X Y)/2) and have a cover of their own. Adding a constant to a context changes nothing, so let its
   least reward be 0 and round the others down to multiples of 2e: the differences move by less than 2e, and stay within
   [-R, R]. Which action is least and the multiples of the others make at most Y (1 + R/(2e))^(Y-1) points a context. Again
   L >= -n e at the point of r^ and D is within 2e of D^, so with d = X (Y - 1) and e = d/n:
   sqrt(E D^2) <= sqrt(c(R) (X log Y + d log(1 + R n/(2d)) + d + log(1/delta))/n) + 2d/n.
4. Reverse KL. With pi_t the tilt of the anchor by r* + t (r^ - r*), the gap beta KL(pi^ || pi*) is
   (1/beta) int_0^1 t Var_{pi_t}(r^ - r*) dt, and Var_{pi_t} <= C Var_mu = C/2 E D^2 when pi_t/mu <= C for all t:
   gap <= C/(4 beta) E D^2. As pi_t <= exp(R/beta) anchor, C <= exp(R/beta) when mu is the anchor: one reference. Pairs of
   several references come from their mixture M_a, the anchor is G_a, and G_a/M_a <= 1/F_a: C <= exp(R/beta)/min_x F_a, with
   no limit that R and beta know.
5. Forward KL. pi^ is optimal for r^, so gap <= (E_{pi~} - E_{pi^})(r* - r^), and each expectation differs from that under mu
   by at most sqrt(C - 1) sd_mu, C the largest of both policies' ratios to mu: gap <= sqrt(2 (C - 1) E D^2).
6. Pessimism, linear class: theta* is in |theta - theta^|_{n Sigma} <= c with Sigma = E (phi1 - phi2)(phi1 - phi2)^T and
   c^2 = n E D^2 bounded by 3, so the policy that is best for its worst case there has gap <= 2c |E_{pi*} phi - nu| in the norm
   of (n Sigma)^-1, and, Sigma being twice the covariance under mu and nu the mean under mu, gap <= sqrt(2 (C* - 1) E D^2), C*
   of pi* alone. The policy is computed with Sigma and nu of the law itself, so rho and mu have to be known (or sampled at
   will): what their estimates from the n pairs cost is not in the bound. Tables too: phi is then one-hot and Sigma has a
   pseudo-inverse, which is enough as E_{pi*} phi - nu sums to 0 in each context.

Source of the comparison with measured gaps: tests/theory/test_bounds.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from polyref.errors import ConfigError

MOST_PAIRS = 10**18


def least_slope(reward_range: float) -> float:
    """kappa = s'(R) = 1/(2 + 2 cosh R); 0 where it underflows."""
    return math.exp(-reward_range) / (1 + math.exp(-reward_range)) ** 2


def difference_constant(reward_range: float) -> float:
    """c(R) of step 2; infinite where kappa underflows."""
    kappa = least_slope(reward_range)
    if kappa == 0:
        return math.inf
    u = kappa * reward_range**2 / 2
    return 8 / kappa * (u / -math.expm1(-u) if u > 0 else 1.0)


def class_error(pairs: float, log_size: float, delta: float, reward_range: float) -> float:
    """E D^2 after `pairs` pairs for a class of exp(log_size) rewards, with probability 1 - delta (steps 1 and 2)."""
    return difference_constant(reward_range) * (log_size - math.log(delta)) / pairs


def linear_error(pairs: float, dimension: int, delta: float, reward_range: float) -> float:
    """E D^2 after `pairs` pairs for a linear class of `dimension` features, with probability 1 - delta (step 3)."""
    log_cover = dimension * math.log1p(reward_range * pairs / dimension)
    return _covered_error(pairs, log_cover, dimension, delta, reward_range)


def table_error(pairs: float, contexts: int, actions: int, delta: float, reward_range: float) -> float:
    """E D^2 after `pairs` pairs for all tables of `contexts` and `actions`, with probability 1 - delta (step 3)."""
    dimension = contexts * (actions - 1)
    log_cover = contexts * math.log(actions) + dimension * math.log1p(reward_range * pairs / (2 * dimension))
    return _covered_error(pairs, log_cover, dimension, delta, reward_range)


def _covered_error(pairs: float, log_cover: float, dimension: int, delta: float, reward_range: float) -> float:
    """Step 3 at e = d/n, whatever the cover of exp(`log_cover`) points."""
    e = dimension / pairs
    at_the_cover = class_error(pairs, log_cover + dimension, delta, reward_range)
    return float((math.sqrt(at_the_cover) + 2 * e) ** 2)


def reverse_gap_bound(error: float, coverage: float, beta: float) -> float:
    """The regularised gap under reverse KL from E D^2 (step 4)."""
    return coverage * error / 4 / beta


def transfer_bound(error: float, coverage: float) -> float:
    """The gap under forward KL (step 5), or of the pessimistic policy under reverse KL (step 6), from E D^2."""
    return math.sqrt(2 * (coverage - 1) * error) if coverage > 1 else 0.0


def mixture_coverage(coverages: list[float]) -> float:
    """C of the equal mixture of K references from the C_i = max pi/pi_i of each: their harmonic mean, as pi_i >= pi/C_i.

    A reference that does not cover at all has C_i = inf; one that covers among K then gives K C_i.
    """
    inverse = sum(1 / one for one in coverages) / len(coverages)
    return 1 / inverse if inverse > 0 else math.inf


def pairs_needed(gap_after: Callable[[float], float], target: float) -> int:
    """The least n with gap_after(n) <= target, `gap_after` decreasing. ConfigError beyond 10^18."""
    low, high = 0, 1
    while gap_after(high) > target:
        low, high = high, 2 * high
        if high > MOST_PAIRS:
            fix = "ask for a larger gap, or give better coverage, a larger beta or a smaller reward range"
            raise ConfigError("more than 10^18 pairs are needed", fix=fix)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if gap_after(middle) <= target else (middle, high)
    return high
