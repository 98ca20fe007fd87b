"""The page to vote on inside a round, in headless Chromium: cast, killed, cast on, and the run trains on what was voted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from cli_world import World

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.ci,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine"),
]


@contextmanager
def running(world: World, words: list[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`polyref WORDS` in a process of its own that serves its page, and where."""
    command = [sys.executable, "-m", "polyref.cli.main", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=world.environment) as process:
        assert process.stderr
        said = list[str]()
        for line in process.stderr:
            said.append(line)
            if line.startswith("vote at "):
                break
        else:
            pytest.fail("".join(said))
        yield process, said[-1].split()[-1]
        process.stderr.read()


def counted(page: Any, done: int) -> None:
    sync_api.expect(page.locator("#counted")).to_have_text(f"{done} of 6", timeout=60_000)


def test_votes_by_mouse_and_keyboard_survive_a_kill_and_the_round_is_trained_on_them(world: World) -> None:
    world.pairs(*({"prompt": f"question {i}?", "chosen": f"yes, {i}", "rejected": f"no {i}"} for i in range(6)))
    settings: dict[str, Any] = {"label": "human", "rounds": 1, "held_out": None, "eval_completions": 1, "prompts_at_once": 32}
    words = world.iterate(**settings, pairing="random", max_new_tokens=12, annotator="ann", question="Which is longer?")
    votes, shown = world.path / "iterate" / "votes-1.jsonl", dict[str, str]()

    def cast(page: Any, done: int, how: str) -> None:
        """Vote for the left completion, or say that it is a tie."""
        counted(page, done)
        assert page.inner_text("h1") == "Which is longer?"
        prompt = page.inner_text("#prompt").split("question")[1][:3].strip()
        shown[prompt] = "tie" if how == "t" else page.inner_text("#left")
        page.click("#vote-a") if how == "mouse" else page.keyboard.press(how)
        counted(page, done + 1)

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, timeout=180_000)
        with running(world, words) as (process, address):
            page = browser.new_page()
            page.goto(address)
            for done, how in enumerate(("mouse", "1", "t")):
                cast(page, done, how)
            before = votes.read_bytes()
            process.kill()
        assert not (world.path / "iterate" / "summary.json").exists() and votes.read_bytes() == before
        with running(world, words) as (process, address):
            page = browser.new_page()
            page.goto(address)
            for done, how in enumerate(("ArrowLeft", "mouse", "1"), 3):
                cast(page, done, how)
            assert process.wait(120) == 0
        browser.close()
    assert votes.read_bytes().startswith(before) and len(votes.read_text().splitlines()) == 6
    summary = json.loads((world.path / "iterate" / "summary.json").read_text())
    assert summary["label"] == "human" and summary["labels"] == 6 and summary["rounds"][1]["ties"] == 1
    assert (world.path / "iterate" / "model" / "model.safetensors").exists() and summary["final_round"] == 1
    rows = [json.loads(line) for line in (world.path / "iterate/stages/label-1/labelled.jsonl").read_text().splitlines()]
    labels = {row["prompt"][-1]["content"].split()[1][:-1]: row for row in rows}
    for number, said in shown.items():
        row = labels[number[:-1]]
        assert row["chosen_probability"] == (0.5 if said == "tie" else 1.0)
        assert said == "tie" or row["chosen"][-1]["content"].strip() == said.strip() or not said.isascii()
