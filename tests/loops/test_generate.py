"""What is drawn and scored is kept chunk by chunk; a torn chunk is made again, and a reward that fails is one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from polyref.data.prompt_rows import PromptRow
from polyref.errors import ModelError
from polyref.loops.generate import Draw, Proposal, Proposed, generate
from polyref.rewards.functions import NamedReward, from_function
from polyref.rewards.protocols import Reward
from polyref.stages import RunFolder
from polyref.types import Text

PROMPTS = [PromptRow(f"question {number}?", None, "prompts", number) for number in range(3)]
LENGTH = from_function(lambda prompt, text: float(len(str(text))), "length")


def made(folder: Path, drawn: list[str], reward: Reward = LENGTH, finish: bool = True) -> list[Proposed]:
    """Two proposals a prompt, one prompt a chunk; the prompts that were drawn for are added to `drawn`."""

    def open_draw() -> Draw:
        def draw(some: Sequence[PromptRow]) -> list[Proposed]:
            drawn.extend(str(row.prompt) for row in some)
            return [Proposed(tuple(Proposal(str(row.row) * n, n, True, -1.0, ()) for n in (1, 2)), 2, 3) for row in some]

        return draw

    with RunFolder(folder, {}) as run:
        stage = run.stage("generate-1")
        stage.done = not finish
        return generate(stage, PROMPTS, open_draw, lambda: [reward], prompts_at_once=1, progress=lambda *told: None)


def test_a_chunk_that_is_torn_in_an_unfinished_stage_is_drawn_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    drawn = list[str]()
    whole = made(tmp_path / "run", drawn, finish=False)
    assert [[p.rewards for p in one.proposals] for one in whole] == [[(1.0,), (2.0,)]] * 3 and len(drawn) == 3
    chunks = sorted((tmp_path / "run/stages/generate-1").iterdir())
    before = [chunk.read_bytes() for chunk in chunks]
    chunks[1].write_bytes(before[1][: len(before[1]) // 2])
    chunks[2].write_bytes(b'[{"proposals": 3}]')
    drawn.clear()
    assert made(tmp_path / "run", drawn) == whole and drawn == ["question 1?", "question 2?"]
    assert [chunk.read_bytes() for chunk in chunks] == before
    assert caplog.text.count("is torn; its completions are drawn again") == 2


def test_a_reward_that_fails_is_named_in_one_line_and_what_was_scored_is_kept(tmp_path: Path) -> None:
    def failing(prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        if completions[0] == "1":
            raise RuntimeError("out of\nmemory")
        return [float(len(str(text))) for text in completions]

    drawn = list[str]()
    says = "^mine: failed on 2 completions: RuntimeError: out of memory; mend it; the same command goes on from here$"
    with pytest.raises(ModelError, match=says):
        made(tmp_path / "run", drawn, NamedReward("mine", failing))
    drawn.clear()
    made(tmp_path / "run", drawn)
    assert drawn == ["question 1?", "question 2?"]
