"""What a step keeps, and what is said of a policy, in the corners: particles, equal prompts, what a reference cannot give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polyref.data.prompt_rows import PromptRow
from polyref.loops.accept import Acceptance, accept, accept_all
from polyref.loops.evaluate import evaluated
from polyref.loops.generate import Proposal, Proposed, generate
from polyref.references.reference_set import Reference, ReferenceSet
from polyref.rewards.functions import from_function
from polyref.stages import RunFolder

REFERENCES = ReferenceSet((Reference("one"), Reference("two")))
FLAT = Acceptance(1.0, None, 64, 1.0, 0)


def proposed(count: int, *, exact: bool = True, own: float | None = None, other: float | None = None) -> Proposed:
    proposals = [Proposal(f"text {i}", 2, True, own, (-1.0, other), rewards=(0.0,)) for i in range(count)]
    return Proposed(tuple(proposals), count, count, exact)


def test_equal_prompts_and_weights_have_coins_of_their_own() -> None:
    rows = [PromptRow("x"), PromptRow("x"), PromptRow("x", (0.5, 0.5)), PromptRow("x", (0.2, 0.8)), PromptRow("y")]
    kept = [one.indices.tolist() for one in accept_all(rows, [proposed(64)] * 5, FLAT, 1) if one is not None]
    assert len({tuple(indices) for indices in kept}) == 5 and all(5 < len(indices) < 50 for indices in kept)
    alone = accept(rows[3], proposed(64), FLAT)
    assert alone is not None and alone.indices.tolist() == kept[3], "others change nothing"


def test_particles_are_weighed_also_where_their_weights_are_alike() -> None:
    kept = accept(PromptRow("x"), proposed(8, exact=False), FLAT)
    assert kept is not None and kept.acceptance is None and not kept.exact and len(kept.indices) == 64


def test_a_prompt_of_which_a_reference_gives_no_proposal_is_left_out_by_a_correction() -> None:
    how = Acceptance(1.0, 2.0, 4, None, 0, REFERENCES)
    impossible, possible = proposed(4, own=-2.0), proposed(4, own=-2.0, other=-3.0)
    kept = accept_all([PromptRow("x"), PromptRow("y")], [impossible, possible], how, 2)
    assert kept[0] is None and kept[1] is not None and len(kept[1].indices) == 4


def test_what_a_reference_cannot_score_is_counted_and_one_prompt_under_two_weights_is_one() -> None:
    rows = [PromptRow("x", (0.5, 0.5), row=1), PromptRow("x", (1.0, 0.0), row=2)]
    told = evaluated(rows, [proposed(2, own=-2.0), proposed(2, own=-2.0)], None, REFERENCES, seed=0)
    assert told["unscored"] == 2 and told["kl"] == [-1.0, None, None] and told["reward"] == [0.0, None, None]


@pytest.mark.parametrize(("ended", "text"), [(False, "caf"), (True, "caf\ufffd")])
def test_a_cut_completion_is_scored_and_kept_without_half_a_character(tmp_path: Path, ended: bool, text: str) -> None:
    reward = from_function(lambda prompt, completion: float(len(completion)), "letters")
    drawn = Proposed((Proposal("caf\ufffd", 4, ended, -1.0, ()),), 1, 4)
    with RunFolder(tmp_path / "run", {}) as run:
        options = {"prompts_at_once": 1, "progress": lambda what, done, total: None}
        (found,) = generate(run.stage("propose"), [PromptRow("x")], lambda: lambda some: [drawn], lambda: [reward], **options)
    (one,) = found.proposals
    assert one.text == text and one.rewards == (len(text),) and one.tokens == 4
    assert json.loads((tmp_path / "run/stages/propose/chunk-000000.json").read_text())[0]["proposals"][0]["text"] == text
