"""The stage that draws and scores: completions of some prompts at a time, kept in files, so that a kill loses at most one."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from polyref.data.prompt_rows import PromptRow
from polyref.errors import ModelError, PolyrefError
from polyref.files import write_bytes
from polyref.rewards.protocols import Reward, check_rewards
from polyref.samplers.auxiliary import as_completion
from polyref.stages import Stage
from polyref.types import Text

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Proposal:
    """A completion: its text, the number of its `tokens`, with the one that ends it if it `ended`, and its `rewards` (R,).

    `own` is its log-probability in nats under the policy that drew it, None of a composition; `logps` (K,) those under the
    references, None where a reference was not asked, or cannot give the text any.
    """

    text: str
    tokens: int
    ended: bool
    own: float | None
    logps: tuple[float | None, ...]
    log_weight: float = 0.0
    rewards: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Proposed:
    """The proposals of one prompt: how many were `drawn` to get them, and the `calls`, completion tokens through models.

    `exact`: each is a draw of the law asked for; `note` says in a line what is approximate, or missing.
    """

    proposals: tuple[Proposal, ...]
    drawn: int
    calls: int
    exact: bool = True
    note: str = ""

    @property
    def weighted(self) -> bool:
        """Whether proposals count by their `log_weight`: particles, whose weights may be alike by chance."""
        return bool(self.proposals) and (not self.exact or any(proposal.log_weight for proposal in self.proposals))


def seed_of(seed: int, what: str, number: int) -> int:
    """The seed of one thing that a run of `seed` draws, in round or step `number`: another for each."""
    return xxhash.xxh3_64_intdigest(f"{seed} {what} {number}".encode()) >> 1


Draw = Callable[[Sequence[PromptRow]], list[Proposed]]
"""What draws for some prompts, the same for a prompt whichever others are asked for with it."""

Progress = Callable[[str, int, int], None]
"""Called as (what, done, total)."""


def generate(
    stage: Stage,
    prompts: Sequence[PromptRow],
    open_draw: Callable[[], Draw],
    open_rewards: Callable[[], Sequence[Reward]],
    *,
    prompts_at_once: int,
    progress: Progress,
) -> list[Proposed]:
    """Scored proposals of each prompt. Nothing is opened where all is found, and no chunk that is there whole is made again."""
    starts = range(0, len(prompts), prompts_at_once)
    files = [stage.folder / f"chunk-{number:06d}.json" for number in range(len(starts))]
    kept = [_found(file) for file in files]
    draw, rewards = (open_draw(), open_rewards()) if None in kept else (None, ())
    found: list[Proposed] = []
    for start, file, chunk in zip(starts, files, kept, strict=True):
        if chunk is None and draw is not None:
            some = prompts[start : start + prompts_at_once]
            scored = _scored(some, [_spelt(one) for one in draw(some)], rewards)
            write_bytes(file, json.dumps([asdict(one) for one in scored], allow_nan=False).encode())
        found += chunk or _read(json.loads(file.read_text()))
        if draw is not None:
            progress(stage.name, len(found), len(prompts))
    if not stage.done:
        stage.finish(files)
    return found


def _found(file: Path) -> list[Proposed] | None:
    """What is kept in `file`; None where it is not there, or torn."""
    if not file.exists():
        return None
    try:
        return _read(json.loads(file.read_text()))
    except (ValueError, TypeError, KeyError):
        logger.warning("%s is torn; its completions are drawn again", file)
        return None


def _spelt(one: Proposed) -> Proposed:
    """`one` with the texts of completions that were cut without a last character that their tokens spell in part."""

    def text(p: Proposal) -> str:
        return p.text if p.ended else p.text.rstrip("\ufffd") or p.text

    return replace(one, proposals=tuple(replace(proposal, text=text(proposal)) for proposal in one.proposals))


def _scored(prompts: Sequence[PromptRow], drawn: Sequence[Proposed], rewards: Sequence[Reward]) -> list[Proposed]:
    """`drawn` with the rewards of every proposal. ModelError for one that is no finite number, or that fails."""
    asked: list[Text] = []
    texts: list[Text] = []
    for row, one in zip(prompts, drawn, strict=True):
        asked += [row.prompt] * len(one.proposals)
        texts += [as_completion(row.prompt, proposal.text) for proposal in one.proposals]
    columns = [check_rewards(_rewards(reward, asked, texts), len(texts), reward.name).tolist() for reward in rewards]
    each = iter(list(zip(*columns, strict=True)) if columns else [()] * len(texts))
    return [_with(one, [next(each) for _ in one.proposals]) for one in drawn]


def _rewards(reward: Reward, prompts: Sequence[Text], completions: Sequence[Text]) -> Any:
    with blaming(reward.name, f"{len(completions)} completions"):
        found = reward(prompts, completions)
    return found


@contextmanager
def blaming(who: str, given: str) -> Iterator[None]:
    """ModelError, in one line, for an error of the body that is not one of ours: `who` failed on what it was `given`."""
    try:
        yield
    except PolyrefError:
        raise
    except Exception as error:
        what = f"failed on {given}: {type(error).__name__}: {error}"
        raise ModelError(what, where=who, fix="mend it; the same command goes on from here") from error


def _with(one: Proposed, rewards: Sequence[tuple[float, ...]]) -> Proposed:
    proposals = tuple(
        Proposal(p.text, p.tokens, p.ended, p.own, tuple(map(finite, p.logps)), p.log_weight, values)
        for p, values in zip(one.proposals, rewards, strict=True)
    )
    return Proposed(proposals, one.drawn, one.calls, one.exact, one.note)


def _read(kept: list[dict[str, object]]) -> list[Proposed]:
    return [
        Proposed(**row | {"proposals": tuple(_proposal(one) for one in row["proposals"])})  # type: ignore[arg-type,attr-defined]
        for row in kept
    ]


def _proposal(row: dict[str, object]) -> Proposal:
    return Proposal(**row | {"logps": tuple(row["logps"]), "rewards": tuple(row["rewards"])})  # type: ignore[arg-type]


def finite(value: float | None) -> float | None:
    """`value`, or None where it is no finite number, which JSON does not know."""
    return value if value is not None and math.isfinite(value) else None
