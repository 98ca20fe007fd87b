"""The theory lab's speed: many replicates of one bandit experiment, beside a plain loop over replicates with scipy.optimize.

    python benchmarks/lab.py             # about 4 minutes, with `polyref lab all`
    python benchmarks/lab.py --no_all    # about 1 minute, without it

A replicate draws 1,000 preference pairs of a bandit with 20 contexts, 10 actions and 3 references, fits the Bradley-Terry MLE
in a ball, tilts it in both KL directions, and computes the two gaps. The loop does the same with numpy and scipy, a context at
a time, by the fastest of the methods below on this machine, on 200 replicates; its time is scaled. Both are given the same
draws and must agree. Writes benchmarks/results/lab.json, and exits with 1 where a limit is missed.
"""

from __future__ import annotations

import os

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before numpy and torch: a thread is a chunk of replicates here, not part of an operation

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import optimize, special
from torch import Tensor

from polyref.theory.bandit import FiniteBandit, random_bandit
from polyref.theory.estimators import fit_tabular
from polyref.theory.preferences import bradley_terry, pair_law
from polyref.theory.replicates import map_replicates
from polyref.theory.sampling import draw_wins
from polyref.theory.solutions import forward_optimum, reverse_optimum, solve_forward_kl, solve_reverse_kl
from polyref.theory.values import forward_gap, reverse_gap

CONTEXTS, ACTIONS, REFERENCES, PAIRS, BETA = 20, 10, 3, 1_000, 0.5
RADIUS, RIDGE = 3.0, 1e-6
LIMIT_SECONDS, LIMIT_RATIO, LIMIT_ALL_SECONDS = 20.0, 30.0, 600.0
LARGEST_DISAGREEMENT = 1e-4
"""Of a gap, absolute: scipy's tolerances, not ours."""

RESULTS = Path(__file__).parent / "results" / "lab.json"
Fit = Callable[[np.ndarray], np.ndarray]


def main() -> None:
    arguments = parse_arguments()
    bandit = random_bandit(
        torch.Generator().manual_seed(0), contexts=CONTEXTS, actions=ACTIONS, references=REFERENCES, beta=BETA
    )
    result: dict[str, Any] = {
        "command": "python benchmarks/lab.py" + ("" if arguments.all else " --no_all"),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {p: metadata.version(p) for p in ("torch", "numpy", "scipy", "polyref")}
        | {"python": platform.python_version()},
        "problem": {
            "contexts": CONTEXTS,
            "actions": ACTIONS,
            "references": REFERENCES,
            "pairs": PAIRS,
            "beta": BETA,
            "radius": RADIUS,
        },
    }
    result["polyref"] = ours = time_polyref(bandit, arguments)
    result["plain_loop"] = loop = time_loop(bandit, arguments)
    ratio = loop["scaled_seconds"] / ours["median_seconds"]
    processor_ratio = (
        loop["scaled_seconds"] / loop["seconds"] * loop["processor_seconds"] / statistics.median(ours["processor_seconds"])
    )
    result["ratio"] = {"wall_clock": ratio, "processor_time": processor_ratio}
    met = {
        f"{arguments.replicates} replicates in {LIMIT_SECONDS:.0f} s": ours["median_seconds"] <= LIMIT_SECONDS,
        f"{LIMIT_RATIO:.0f} times faster than the loop": ratio >= LIMIT_RATIO,
        f"gaps agree to {LARGEST_DISAGREEMENT:g}": loop["largest_gap_difference"] <= LARGEST_DISAGREEMENT,
    }
    if arguments.all:
        result["lab_all_seconds"] = seconds = time_all()
        met[f"polyref lab all in {LIMIT_ALL_SECONDS:.0f} s"] = seconds <= LIMIT_ALL_SECONDS
    result["limits_met"] = met
    if not arguments.dry:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    if not all(met.values()):
        raise SystemExit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--loop_replicates", type=int, default=200)
    parser.add_argument("--no_all", dest="all", action="store_false", help="leave `polyref lab all` out")
    parser.add_argument("--dry", action="store_true", help="print the result, write no file")
    return parser.parse_args()


def time_polyref(bandit: FiniteBandit, arguments: argparse.Namespace) -> dict[str, Any]:
    law, preference = draw_from(bandit)

    def chunk(generator: torch.Generator, size: int) -> dict[str, Tensor]:
        return estimate(bandit, draw_wins(law, preference, PAIRS, size, generator))

    map_replicates(chunk, 256, 1, threads=arguments.threads)  # the first call pays for what is cached
    seconds, processor = [], []
    for repeat in range(arguments.repeats):
        wall, used = time.perf_counter(), time.process_time()
        gaps = map_replicates(chunk, arguments.replicates, repeat, threads=arguments.threads)
        seconds.append(time.perf_counter() - wall)
        processor.append(time.process_time() - used)
        print(
            f"polyref, {arguments.replicates} replicates: {seconds[-1]:.2f} s ({processor[-1]:.2f} s of processor)", flush=True
        )
    return {
        "replicates": arguments.replicates,
        "threads": arguments.threads,
        "median_seconds": statistics.median(seconds),
        "seconds": seconds,
        "processor_seconds": processor,
        "mean_gaps": {name: float(values.mean()) for name, values in gaps.items()},
    }


def draw_from(bandit: FiniteBandit) -> tuple[Tensor, Tensor]:
    return pair_law(bandit.contexts, bandit.mixture), bradley_terry(bandit.rewards)


def estimate(bandit: FiniteBandit, wins: Tensor) -> dict[str, Tensor]:
    rewards = fit_tabular(wins, radius=RADIUS, ridge=RIDGE)
    reverse = solve_reverse_kl(rewards, bandit.geometric, BETA)
    forward = solve_forward_kl(rewards, bandit.mixture, BETA).log_policy
    return {"reverse": reverse_gap(reverse, bandit), "forward": forward_gap(forward, bandit)}


def time_loop(bandit: FiniteBandit, arguments: argparse.Namespace) -> dict[str, Any]:
    """The plain loop: the fastest method on the first few replicates, then the whole of it."""
    trial = {}
    for name, fit in METHODS.items():
        start = time.perf_counter()
        run_loop(bandit, fit, 3)
        trial[name] = (time.perf_counter() - start) / 3
        print(f"plain loop, {name}: {trial[name]:.3f} s a replicate", flush=True)
    fastest = min(trial, key=lambda name: trial[name])
    start, used = time.perf_counter(), time.process_time()
    wins, gaps = run_loop(bandit, METHODS[fastest], arguments.loop_replicates)
    seconds, processor = time.perf_counter() - start, time.process_time() - used
    print(f"plain loop, {arguments.loop_replicates} replicates: {seconds:.2f} s ({processor:.2f} s of processor)", flush=True)
    own = estimate(bandit, torch.from_numpy(wins))
    difference = np.abs(np.stack([own["reverse"].numpy(), own["forward"].numpy()], -1) - gaps)
    return {
        "replicates": arguments.loop_replicates,
        "method": fastest,
        "seconds": seconds,
        "processor_seconds": processor,
        "scaled_seconds": seconds * arguments.replicates / arguments.loop_replicates,
        "trial_seconds_a_replicate": trial,
        "largest_gap_difference": float(difference.max()),
        "mean_gaps": {"reverse": float(gaps[:, 0].mean()), "forward": float(gaps[:, 1].mean())},
    }


def run_loop(bandit: FiniteBandit, fit: Fit, replicates: int) -> tuple[np.ndarray, np.ndarray]:
    """Wins (R, X, Y, Y) and gaps (R, 2), one replicate and one context after the other."""
    law, preference = (table.numpy() for table in draw_from(bandit))
    outcomes = ((law + law.transpose(0, 2, 1)) * preference).ravel()
    generator = np.random.default_rng(0)
    rho, geometric, mixture = bandit.contexts.numpy(), bandit.geometric.numpy(), bandit.mixture.exp().numpy()
    best_reverse, best_forward = reverse_optimum(bandit).numpy(), forward_optimum(bandit).exp().numpy()
    wins, gaps = np.empty((replicates, *law.shape)), np.zeros((replicates, 2))
    for r in range(replicates):
        wins[r] = generator.multinomial(PAIRS, outcomes / outcomes.sum()).reshape(law.shape)
        for x in range(CONTEXTS):
            rewards = fit(wins[r, x])
            log_policy = special.log_softmax(geometric[x] + rewards / BETA)
            gaps[r, 0] += rho[x] * BETA * (np.exp(log_policy) @ (log_policy - best_reverse[x]))
            ratio = forward_tilt(rewards, mixture[x]) / best_forward[x]
            gaps[r, 1] += rho[x] * BETA * (mixture[x] @ (ratio - 1 - np.log(ratio)))
    return wins, gaps


def forward_tilt(rewards: np.ndarray, mixture: np.ndarray) -> np.ndarray:
    best = rewards.max()
    low, high = (rewards + BETA * mixture).max() - best, BETA
    t = (
        high
        if low >= high
        else optimize.brentq(lambda t: (BETA * mixture / (t + best - rewards)).sum() - 1, low, high, xtol=1e-14)
    )
    return BETA * mixture / (t + best - rewards)


FIRST, SECOND = np.triu_indices(ACTIONS, 1)
INCIDENCE = np.eye(ACTIONS)[FIRST] - np.eye(ACTIONS)[SECOND]
BALL = {"type": "ineq", "fun": lambda r: RADIUS**2 - r @ r, "jac": lambda r: -2 * r}


def likelihood(wins: np.ndarray) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    """-log likelihood + ridge/2 |r|^2, and its gradient, over the unordered pairs of one context."""
    forth, total = wins[FIRST, SECOND], wins[FIRST, SECOND] + wins[SECOND, FIRST]

    def value(r: np.ndarray) -> tuple[float, np.ndarray]:
        h = r[FIRST] - r[SECOND]
        slope = total * special.expit(h) - forth
        return float(total @ np.logaddexp(0, h) - forth @ h + RIDGE / 2 * r @ r), slope @ INCIDENCE + RIDGE * r

    return value


def by_slsqp(wins: np.ndarray) -> np.ndarray:
    """SLSQP with the ball as its constraint."""
    options = {"ftol": 1e-10, "maxiter": 500}
    return optimize.minimize(
        likelihood(wins), np.zeros(ACTIONS), jac=True, method="SLSQP", constraints=[BALL], options=options
    ).x


def by_lbfgs_then_slsqp(wins: np.ndarray) -> np.ndarray:
    """L-BFGS-B without the ball, which is the answer where it lies inside; else SLSQP from its projection."""
    value = likelihood(wins)
    options = {"ftol": 1e-14, "gtol": 1e-7}
    free = optimize.minimize(value, np.zeros(ACTIONS), jac=True, method="L-BFGS-B", options=options).x
    if (norm := math.sqrt(free @ free)) <= RADIUS:
        return free
    start = free * (RADIUS / norm)
    return optimize.minimize(
        value, start, jac=True, method="SLSQP", constraints=[BALL], options={"ftol": 1e-10, "maxiter": 500}
    ).x


def by_lagrangian(wins: np.ndarray) -> np.ndarray:
    """L-BFGS-B on the likelihood plus m/2 |r|^2, with m by bracketing so that |r| = radius where the ball binds."""
    value, start = likelihood(wins), np.zeros(ACTIONS)

    def solve(m: float) -> np.ndarray:
        def penalised(r: np.ndarray) -> tuple[float, np.ndarray]:
            f, gradient = value(r)
            return f + m / 2 * r @ r, gradient + m * r

        return optimize.minimize(penalised, start, jac=True, method="L-BFGS-B", options={"ftol": 1e-14, "gtol": 1e-7}).x

    free = solve(0.0)
    if free @ free <= RADIUS**2:
        return free
    m = optimize.brentq(lambda m: 1 / math.sqrt((r := solve(m)) @ r) - 1 / RADIUS, 0.0, 2 * wins.sum() / RADIUS, xtol=1e-7)
    return solve(m)


METHODS: dict[str, Fit] = {
    "SLSQP": by_slsqp,
    "L-BFGS-B, then SLSQP outside the ball": by_lbfgs_then_slsqp,
    "L-BFGS-B with a multiplier": by_lagrangian,
}


def time_all() -> float:
    """Seconds of `polyref lab all` as a user runs it."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        script = "import sys; from polyref.cli.main import main; sys.exit(main())"
        command = [sys.executable, "-c", script, "lab", "all", "--output_dir", str(Path(folder) / "lab")]
        subprocess.run(command, check=True)
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
