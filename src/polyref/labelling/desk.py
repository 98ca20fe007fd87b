"""What an annotator is asked and answers, as plain values: the next pair, a vote, a vote taken back. Knows nothing of HTTP."""

from __future__ import annotations

import threading
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from polyref.errors import DataError
from polyref.labelling.labels import shares
from polyref.labelling.pairs import Pair, Place, left_of, sides
from polyref.labelling.votes import Vote, Votes, check_annotator
from polyref.types import Text

ANSWERS = ("left", "right", "tie", "skip")
"""What can be said of two completions as they are shown."""

_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def shown(text: str) -> str:
    """`text` with line ends as \\n, and with control characters and those that turn the direction of text written out."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return "".join(_escaped(c) if c in _TURNING or unicodedata.category(c) in ("Cc", "Cs") else c for c in lines)


def _escaped(character: str) -> str:
    return character if character in "\n\t" else character.encode("unicode_escape").decode()


def turns_of(text: Text) -> list[dict[str, str]]:
    """The turns of a prompt as they are shown; plain text is one turn of no role."""
    if isinstance(text, str):
        return [{"role": "", "text": shown(text)}]
    return [{"role": shown(message["role"]), "text": shown(message["content"])} for message in text]


def completion_text(text: Text) -> str:
    """A completion as it is shown: it is one turn of the assistant, whose role goes without saying."""
    return shown(text) if isinstance(text, str) else "\n\n".join(shown(message["content"]) for message in text)


class Desk:
    """One annotator before `pairs`, with `votes` to write in. Threads may share it; `changed` is told of every vote.

    Pairs are asked about in their order; which completion is on the left is `left_of(pair, seed)`.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        votes: Votes,
        *,
        seed: int,
        annotator: str = "",
        question: str = "Which completion is better?",
    ) -> None:
        check_annotator(annotator)
        self.pairs = {pair.id: pair for pair in pairs}
        self.votes, self.seed, self.annotator, self.question = votes, seed, annotator, question
        self.changed = threading.Condition()

    @property
    def total(self) -> int:
        """Distinct pairs."""
        return len(self.pairs)

    def missing(self) -> list[Pair]:
        """The pairs on which the annotator has not voted, in order."""
        voted = self.votes.of(self.annotator)
        return [pair for id, pair in self.pairs.items() if id not in voted]

    def next(self) -> dict[str, Any]:
        """The first pair without a vote (None if all have one), and how many have one."""
        missing = self.missing()
        return self._state(missing[0] if missing else None, len(missing))

    def vote(self, id: Any, answer: Any) -> dict[str, Any]:
        """Keep `answer`, one of `ANSWERS`, on pair `id`, and go on; an earlier vote on it is replaced.

        Errors: DataError for no such pair or answer; RunFolderError where it cannot be kept.
        """
        pair = self._known(id)
        if answer not in ANSWERS:
            raise DataError("there is no such answer", fix=f"give one of {', '.join(ANSWERS)}")
        left = left_of(pair, self.seed)
        with self.changed:
            self.votes.cast(Vote(pair.id, in_content(answer, left), left, self.annotator))
            self.changed.notify_all()
        return self.next()

    def undo(self, id: Any = None) -> dict[str, Any]:
        """Take the annotator's vote on pair `id` back, or the last one; that pair is asked about again. Errors as `vote`."""
        if id is not None:
            self._known(id)
        with self.changed:
            mine = {key: vote for key, vote in self.votes.of(self.annotator).items() if key in self.pairs}
            key = id if id is not None else next(reversed(mine), None)
            if key in mine:
                self.votes.take_back(mine[key])
                self.changed.notify_all()
        return self.next() if key is None else self._state(self.pairs[key], len(self.missing()))

    def ask_again(self) -> None:
        """Ask about the annotator's skipped pairs again, where every pair has a vote and no vote gives any of them a label."""
        if not self.missing() and not shares(vote for vote in self.votes.all() if vote.id in self.pairs):
            for id, vote in self.votes.of(self.annotator).items():
                if id in self.pairs:
                    self.votes.take_back(vote)

    def wait(self, told: Callable[[int, int], None] | None = None, *, grace: float = 0.0) -> None:
        """Return once all pairs have had a vote for `grace` seconds, telling (done, total) after each vote."""
        with self.changed:
            while True:
                missing = len(self.missing())
                if told is not None:
                    told(self.total - missing, self.total)
                if not self.changed.wait(None if missing else grace) and not missing:
                    return

    def _known(self, id: Any) -> Pair:
        if not isinstance(id, str) or id not in self.pairs:
            raise DataError("there is no such pair", fix="load the page again")
        return self.pairs[id]

    def _state(self, pair: Pair | None, missing: int) -> dict[str, Any]:
        state = {"question": shown(self.question), "done": self.total - missing, "total": self.total, "pair": None}
        if pair is not None:
            left, right = map(completion_text, sides(pair, self.seed))
            state["pair"] = {"id": pair.id, "prompt": turns_of(pair.prompt), "left": left, "right": right}
        return state


def in_content(answer: str, left: Place) -> str:
    """`answer` of what was shown, as a choice of a `Vote`, where `left` was on the left."""
    other = "second" if left == "first" else "first"
    return {"left": left, "right": other}.get(answer, answer)
