"""The page as a person meets it, in headless Chromium: mouse, keyboard, reload, two tabs, hostile text, a narrow screen."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from labelling_world import some_pairs
from polyref.labelling import Desk, Pair, Votes, pairs_of, served
from polyref.types import PreferenceRecord

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.ci,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine"),
]
Open = Callable[..., Any]
HOSTILE = (
    "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\"></div></main>"
    "<style>*{display:none}</style> {{nonce}} ${1} &amp; javascript:alert(1) \x1b[31m \u202egnp.exe עברית \u200f"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, timeout=180_000)
        yield browser
        browser.close()


class Annotator:
    """Tabs of one browser before the page of `pairs`; a page that logs an error or asks another host fails the test."""

    def __init__(self, browser: Any, pairs: list[Pair], votes: Votes) -> None:
        self.desk, self.errors = Desk(pairs, votes, seed=0), list[str]()
        self.context = browser.new_context(viewport={"width": 1200, "height": 800})
        self.context.set_default_timeout(60_000)
        self.address = ""

    def tab(self) -> Any:
        page = self.context.new_page()
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: self.errors.append(request.url) if self._foreign(request.url) else None)
        page.goto(self.address)
        page.wait_for_selector("#left")
        return page

    def _foreign(self, url: str) -> bool:
        return not url.startswith((self.address, "data:"))

    def choices(self) -> list[str]:
        """The choices in the order in which they were made, in the terms of the content."""
        return [vote.choice for vote in self.desk.votes.all()]


@pytest.fixture
def sit(browser: Any, tmp_path: Path) -> Iterator[Callable[[list[Pair]], Annotator]]:
    """Seat an annotator before some pairs."""
    with Votes(tmp_path / "votes.jsonl") as votes:
        seated: list[tuple[Annotator, Any]] = []

        def sit(pairs: list[Pair]) -> Annotator:
            annotator = Annotator(browser, pairs, votes)
            serving = served(annotator.desk, grace=1.0)
            annotator.address = serving.__enter__()
            seated.append((annotator, serving))
            return annotator

        yield sit
        for annotator, serving in seated:
            annotator.context.close()
            serving.__exit__(None, None, None)
            assert annotator.errors == []


def counted(page: Any, done: int, total: int = 6) -> None:
    """Wait until the page says so."""
    sync_api.expect(page.locator("#counted")).to_have_text(f"{done} of {total}", timeout=60_000)


def side(page: Any, wanted: str) -> str:
    """left or right, where the completion that begins with `wanted` is."""
    return "left" if page.inner_text("#left").startswith(wanted) else "right"


def test_votes_by_mouse_and_by_keyboard(sit: Open) -> None:
    annotator = sit(some_pairs(8))
    page = annotator.tab()
    counted(page, 0, 8)
    page.click("#vote-a" if side(page, "better") == "left" else "#vote-b")
    counted(page, 1, 8)
    page.keyboard.press("1" if side(page, "worse") == "left" else "2")
    counted(page, 2, 8)
    page.keyboard.press("ArrowLeft" if side(page, "better") == "left" else "ArrowRight")
    counted(page, 3, 8)
    page.keyboard.press("t")
    counted(page, 4, 8)
    page.click("text=Skip")
    counted(page, 5, 8)
    assert annotator.choices() == ["first", "second", "first", "tie", "skip"]
    assert page.inner_text("#said") == "Skipped: counted."
    page.keyboard.press("u")
    counted(page, 4, 8)
    page.click("#undo")
    counted(page, 3, 8)
    assert annotator.choices() == ["first", "second", "first"] and "question 3?" in page.inner_text("#prompt")


def test_nothing_is_voted_by_accident(sit: Open) -> None:
    annotator = sit(some_pairs())
    page = annotator.tab()
    counted(page, 0)
    page.click("#vote-tie")
    counted(page, 1)
    for key in ("Enter", "Space", "Control+1", "Shift+ArrowLeft", "3", "a"):
        page.keyboard.press(key)
    page.dispatch_event("#vote-a", "click", {"detail": 2})
    page.evaluate("document.dispatchEvent(new KeyboardEvent('keydown', {key: '1', repeat: true}))")
    page.uncheck("#keys")
    page.keyboard.press("1")
    page.check("#keys")
    page.focus("#vote-skip")
    page.keyboard.press("Enter")  # a button that was gone to on purpose
    counted(page, 2)
    assert annotator.choices() == ["tie", "skip"]
    assert page.evaluate("document.activeElement.id") == "question"


def test_a_reload_keeps_the_order_and_what_was_done(sit: Open) -> None:
    annotator = sit(some_pairs())
    page = annotator.tab()
    counted(page, 0)
    page.keyboard.press("t")
    counted(page, 1)
    before = [page.inner_text(where) for where in ("#prompt", "#left", "#right")]
    for _ in range(3):
        page.reload()
        counted(page, 1)
        assert [page.inner_text(where) for where in ("#prompt", "#left", "#right")] == before
    page.keyboard.press("u")
    counted(page, 0)
    assert "question 0?" in page.inner_text("#prompt") and annotator.choices() == []


def test_two_tabs_lose_no_vote(sit: Open) -> None:
    annotator = sit(some_pairs())
    one, two = annotator.tab(), annotator.tab()
    counted(one, 0)
    counted(two, 0)
    one.click("#vote-tie")
    counted(one, 1)
    two.click("#vote-skip")  # on the same pair, which it still shows
    counted(two, 1)
    assert annotator.choices() == ["skip"], "the last one counts"
    two.keyboard.press("t")
    counted(two, 2)
    one.keyboard.press("s")  # on the second pair, which the other tab has voted on meanwhile
    counted(one, 2)
    assert "question 2?" in one.inner_text("#prompt") and annotator.choices() == ["skip", "skip"]
    for page in (one, two, one, two):
        done = len(annotator.choices())
        page.reload()
        counted(page, done)
        page.keyboard.press("1")
        counted(page, done + 1)
    assert one.inner_text("h1").startswith("Which") and two.inner_text("h1") == "Every pair has your vote"
    assert len(annotator.choices()) == 6


def test_hostile_text_is_shown_as_text(sit: Open) -> None:
    turns = tuple({"role": role, "content": HOSTILE} for role in ("system", "user", "<b>tool</b>"))
    replies = [({"role": "assistant", "content": text},) for text in (HOSTILE, "w" * 5000)]
    annotator = sit(pairs_of([PreferenceRecord(turns, *replies), PreferenceRecord(HOSTILE, HOSTILE + "1", " \n ")]))
    page = annotator.tab()
    for done in (0, 1):
        counted(page, done, 2)
        assert page.title() == "polyref label" and page.locator("main img, main script, main style, main b").count() == 0
        shown = page.inner_text("main")
        for text in (
            "<script>document.title = 'owned'</script>",
            "<img src=x onerror=",
            "{{nonce}} ${1} &amp;",
            "\\u202egnp.exe",
        ):
            assert shown.count(text) == (4 if done == 0 else 2)
        assert "\\x1b[31m" in shown and "\x1b" not in shown and "\u202e" not in shown
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        if done == 0:
            assert page.locator(".role").all_text_contents() == ["system", "user", "<b>tool</b>"]
            page.keyboard.press("1")
    assert "(empty)" in shown


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_narrow_screen_in_light_and_dark(scheme: str, sit: Open) -> None:
    long = "word " * 2000
    annotator = sit(pairs_of([PreferenceRecord("https://example.org/" + "x" * 400, "a" * 900, long)]))
    page = annotator.tab()
    page.emulate_media(color_scheme=scheme)
    counted(page, 0, 1)
    for width, height in ((320, 640), (400, 850), (1200, 800)):
        page.set_viewport_size({"width": width, "height": height})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        for button in page.locator("button").all():
            box = button.bounding_box()
            assert box["height"] >= 40 and 0 <= box["x"] and box["x"] + box["width"] <= width, "within reach"
            assert box["y"] + box["height"] <= height, "without scrolling"
    colours = page.evaluate(CONTRASTS)
    assert min(colours.values()) >= 4.5, colours


CONTRASTS = """() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const linear = (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (colour) => parts(colour).slice(0, 3)
    .reduce((sum, v, i) => sum + linear(v / 255) * [0.2126, 0.7152, 0.0722][i], 0);
  const own = (at) => getComputedStyle(at).backgroundColor;
  const behind = (at) => (parts(own(at))[3] ?? 1) ? own(at) : behind(at.parentElement);
  const shown = document.querySelectorAll("h1, h2, .text, #counted, .below label, button:enabled");
  return Object.fromEntries([...shown].map((at) => {
    const [low, high] = [light(getComputedStyle(at).color), light(behind(at))].sort((a, b) => a - b);
    return [at.id || at.className || at.textContent, (high + 0.05) / (low + 0.05)];
  }));
}"""


def test_its_end_is_said_and_so_is_that_of_polyref(sit: Open, browser: Any, tmp_path: Path) -> None:
    annotator = sit(some_pairs(1))
    page = annotator.tab()
    counted(page, 0, 1)
    page.keyboard.press("1")
    counted(page, 1, 1)
    assert page.inner_text("h1") == "Every pair has your vote" and page.is_enabled("#undo") and page.is_disabled("#vote-a")
    page.keyboard.press("u")
    counted(page, 0, 1)
    page.keyboard.press("2")
    page.wait_for_selector("text=They are kept. You can close this page.")
    assert page.is_disabled("#undo") and len(annotator.choices()) == 1
    with Votes(tmp_path / "other.jsonl") as votes:
        other = Annotator(browser, some_pairs(), votes)
        with served(other.desk) as other.address:
            page = other.tab()
            counted(page, 0)
        page.keyboard.press("1")
        page.wait_for_selector("#trouble:visible")
        assert re.match(r"polyref does not answer: it has ended\. Every vote it counted is kept\.", page.inner_text("#trouble"))
        assert page.inner_text("#counted") == "0 of 6" and not votes.all()
        other.context.close()
