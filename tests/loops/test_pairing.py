"""Pairs of what a step kept: labels, weights and ends survive the file, and what is done is not done again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polyref.data.prompt_rows import PromptRow
from polyref.errors import DataError
from polyref.loops import pairing
from polyref.loops.accept import Acceptance, accept
from polyref.loops.generate import Proposal, Proposed
from polyref.loops.pairing import Pairing, pair
from polyref.stages import RunFolder

ROWS = [PromptRow("a", (0.5, 0.5), "file", 1), PromptRow("b", (1.0, 0.0), "file", 2), PromptRow("c", (1.0, 0.0), "file", 3)]
TEXTS = [(" one\u2028line", " \x85two\r\n"), ("", " four"), (" five", " five")]


def proposed() -> list[Proposed]:
    return [
        Proposed(tuple(Proposal(text, 2, bool(i), None, (), 0.0, (float(i),)) for i, text in enumerate(texts)), 2, 4)
        for texts in TEXTS
    ]


def how(**changes: object) -> Pairing:
    return Pairing(
        **{"name": "random", "pairs": 2, "labels": "soft", "min_margin": 0.0, "tie_within": 0.0, "seed": 0} | changes
    )  # type: ignore[arg-type]


def test_pairs_survive_the_file_with_labels_weights_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = proposed()
    kept = [accept(row, one, Acceptance(1e9, None, 2, None, 0)) for row, one in zip(ROWS, some, strict=True)]
    with RunFolder(tmp_path / "run", {}) as folder:
        records, counts = pair(folder.stage("pair-1"), ROWS, some, kept, how())
        assert [(one.chosen, one.rejected) for one in records] == [(TEXTS[0][1], TEXTS[0][0]), (" four", "")]
        assert [one.reference_weights for one in records] == [(0.5, 0.5), (1.0, 0.0)]
        assert [one.chosen_probability for one in records] == [pytest.approx(float(torch.tensor(1.0).sigmoid()))] * 2
        assert [(one.chosen_ended, one.rejected_ended) for one in records] == [(True, False)] * 2
        assert counts == {"pairs": 2, "ties": 0, "prompts_without_pairs": 1}
        monkeypatch.setattr(pairing, "make_pairs", lambda *args, **options: pytest.fail("done already"))
        assert pair(folder.stage("pair-1"), ROWS, some, kept, how()) == (records, counts)


def test_hard_labels_know_ties_and_no_pair_at_all_is_said(tmp_path: Path) -> None:
    some = proposed()
    kept = [accept(row, one, Acceptance(1e9, None, 2, None, 0)) for row, one in zip(ROWS, some, strict=True)]
    with RunFolder(tmp_path / "run", {}) as folder:
        records, counts = pair(folder.stage("ties"), ROWS, some, kept, how(labels="hard", tie_within=1.0))
        assert [one.chosen_probability for one in records] == [0.5, 0.5] and counts["ties"] == 2
        with pytest.raises(DataError, match="none of 3 prompts gives a pair"):
            pair(folder.stage("none"), ROWS, some, kept, how(min_margin=2.0))
