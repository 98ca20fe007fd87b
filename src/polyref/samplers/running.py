"""Completions under way: rows that are done make room for requests that wait, so that a batch stays full."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from polyref.samplers.engine import SamplingParameters
from polyref.samplers.rows import Rows
from polyref.samplers.tokens import Coupling, next_tokens

_REFILL = 8  # places are filled again when at least this part of the batch is free: reading prompts one by one is slow


class Request(NamedTuple):
    """One completion to draw: which prompt, which of its draws, and the key of the randomness that chooses its tokens."""

    prompt: int
    draw: int
    key: int


@dataclass
class Draft:
    """What a request has drawn so far; `ended` once its last token is one that ends a completion."""

    request: Request
    stream: Any
    token_ids: list[int] = field(default_factory=list)
    logp: float = 0.0
    drawn_logp: float = 0.0
    ended: bool = False


class Running:
    """`requests` for completions of prompts `ids`, drawn in this order, at most `batch_size` at once.

    A prompt is read once for its requests, if these are side by side and the model's cache is of keys and values alone.
    """

    def __init__(
        self,
        read: Callable[[Sequence[Sequence[int]]], Rows],
        ids: Sequence[Sequence[int]],
        requests: Sequence[Request],
        parameters: SamplingParameters,
        ends: frozenset[int],
        batch_size: int,
        coupling: Coupling,
    ) -> None:
        self._read, self._ids, self._waiting, self._parameters = read, ids, deque(requests), parameters
        self._ends, self._batch_size, self._coupling = ends, batch_size, coupling
        self._drafts: list[Draft] = []
        self._rows: Rows | None = None
        self._held: dict[int, Rows] = {}  # the prompt whose requests are under way in part, read already

    def __bool__(self) -> bool:
        return bool(self._waiting or self._drafts)

    @torch.inference_mode()
    def advance(self) -> list[Draft]:
        """Fill free places, let every row draw a token, and give back those that are done with it."""
        self._admit()
        assert self._rows is not None
        streams, steps = [draft.stream for draft in self._drafts], [len(draft.token_ids) for draft in self._drafts]
        tokens, own, law = next_tokens(self._rows.logits, streams, steps, self._parameters, self._coupling)
        for draft, token, logp, drawn_logp in zip(self._drafts, tokens.tolist(), own.tolist(), law.tolist(), strict=True):
            draft.token_ids.append(token)
            draft.logp += logp
            draft.drawn_logp += drawn_logp
            draft.ended = token in self._ends
        most = self._parameters.max_new_tokens
        at = [i for i, draft in enumerate(self._drafts) if draft.ended or len(draft.token_ids) == most]
        done = [self._drafts[i] for i in at]
        if len(done) == len(self._drafts):
            self._rows, self._drafts = None, []
            return done
        if done:
            self._rows, going = self._rows.drop(at)
            self._drafts = [self._drafts[i] for i in going]
            tokens = tokens[torch.tensor(going, device=tokens.device)]
        self._rows.step(tokens)
        return done

    def _admit(self) -> None:
        """Take requests into free places, if they are worth it: a part of the batch, all that wait, or an empty batch's."""
        room = min(self._batch_size - len(self._drafts), len(self._waiting))
        worth = 0 < room >= min(max(self._batch_size // _REFILL, 1), len(self._waiting))
        if self._rows is not None and not (worth and self._rows.joinable):
            return
        some = [self._waiting.popleft() for _ in range(room)]
        for request in some:
            self._drafts.append(Draft(request, self._coupling.stream(request.key, self._parameters.max_new_tokens)))
        for rows in self._ready([request.prompt for request in some]):
            self._rows = rows if self._rows is None else self._rows.join(rows)

    def _ready(self, prompts: Sequence[int]) -> list[Rows]:
        """Rows that have read `prompts`, in this order; the last prompt's is held if more of its requests wait."""
        found = [self._held[p].pick([0] * prompts.count(p)) for p in dict.fromkeys(prompts) if p in self._held]
        if new := [p for p in dict.fromkeys(prompts) if p not in self._held]:
            rows = self._read([self._ids[p] for p in new])
            found.append(rows.pick([new.index(p) for p in prompts if p in new]))
            self._held = {new[-1]: rows.pick([len(new) - 1])} if rows.joinable else {}
        self._held = {p: rows for p, rows in self._held.items() if self._waiting and self._waiting[0].prompt == p}
        return found
