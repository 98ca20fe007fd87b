"""The draws of an enhancer: particles by their weights, exact ones as they are, and what is told of either."""

from __future__ import annotations

import math

import pytest

from polyref.data.prompt_rows import PromptRow
from polyref.loops.agents import Agent, equal_draws, merged, staying
from polyref.loops.generate import Proposal, Proposed
from polyref.samplers.engine import SamplingParameters

AGENT = Agent("references", 4, SamplingParameters(8), stays="best")


def drawn(*log_weights: float, exact: bool = False, note: str = "") -> Proposed:
    """Particles, each of a reward that is its number."""
    proposals = [Proposal(f"text {i}", 2, True, None, (), w, (float(i),)) for i, w in enumerate(log_weights)]
    return Proposed(tuple(proposals), 9, 30, exact, note)


def test_particles_come_as_often_as_their_weights_say() -> None:
    prompts = [PromptRow(f"p{i}", row=i) for i in range(600)]
    particles = [drawn(math.log(0.1), -math.inf, math.log(0.6), math.log(0.3))] * 600
    found, told = equal_draws(prompts, particles, AGENT, 7)
    texts = [proposal.text for one in found for proposal in one.proposals]
    shares = [texts.count(f"text {i}") / len(texts) for i in range(4)]
    assert shares == pytest.approx([0.1, 0, 0.6, 0.3], abs=0.02) and len(texts) == 2400
    assert not any(proposal.log_weight for one in found for proposal in one.proposals) and not any(one.exact for one in found)
    assert (told["inexact_prompts"], told["short_prompts"], told["note"]) == (600, 0, "")
    best = [staying(one, AGENT) for one in found]
    assert all(
        one.proposals[i].rewards[0] == max(p.rewards[0] for p in one.proposals) for one, (i,) in zip(found, best, strict=True)
    )
    assert equal_draws(prompts[5:6], particles[5:6], AGENT, 7)[0] == found[5:6], "others change nothing"
    assert equal_draws(prompts, particles, AGENT, 8)[0] != found


def test_equal_prompts_take_particles_of_their_own() -> None:
    prompts, particles = [PromptRow("p", row=i) for i in range(40)], [drawn(*[0.0] * 16)] * 40
    found, _ = equal_draws(prompts, particles, AGENT, 0)
    assert len({tuple(proposal.text for proposal in one.proposals) for one in found}) > 1


def test_exact_draws_stay_as_they_are_and_what_is_missing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    prompts = [PromptRow(f"p{i}") for i in range(3)]
    exact = [drawn(0.0, 0.0, 0.0, 0.0, exact=True) for _ in prompts]
    assert equal_draws(prompts, exact, AGENT, 0) == (exact, {"inexact_prompts": 0, "short_prompts": 0, "note": ""})
    assert not caplog.text
    short = [exact[0], drawn(0.0, exact=True, note="1 of 4 completions: the budget is spent"), drawn(note="none is left")]
    found, told = equal_draws(prompts, short, AGENT, 0)
    note = "1 of 4 completions: the budget is spent"
    assert found == short and told == {"inexact_prompts": 1, "short_prompts": 2, "note": note}
    says = "1 of 3 prompts are drawn by particles, which is approximate; 2 got fewer than 4 completions; the first says: "
    assert says + note in caplog.text


def test_what_is_said_of_both_agents_is_kept() -> None:
    (one,), (groups,) = merged([drawn(0.0, exact=True, note="a")], [drawn(0.0, 0.0, note="b")])
    assert (one.exact, one.note, one.drawn, one.calls, groups) == (False, "a; b", 18, 60, [0, 1, 1])
