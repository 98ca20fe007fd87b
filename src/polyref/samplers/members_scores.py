"""What a member gives completions that are there already: one pass behind each prompt, read once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from polyref.data.encode import Ids
from polyref.errors import ModelError
from polyref.samplers.members import Member
from polyref.samplers.rows import Rows


def member_logps(member: Member, items: Sequence[tuple[Ids, Ids]], batch_size: int) -> list[float]:
    """log pi(completion | prompt) in nats for each (prompt tokens, completion tokens), `batch_size` at a time.

    -inf for a completion with a token outside the member's vocabulary. ModelError for NaN.
    """
    order = sorted(range(len(items)), key=lambda i: (len(items[i][0]), items[i][0], len(items[i][1])))
    found = [0.0] * len(items)
    with member.switched() as model:
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            for i, logp in zip(some, _batch_logps(model, [items[i] for i in some], member.label), strict=True):
                found[i] = logp
    return found


def _batch_logps(model: Any, items: Sequence[tuple[Ids, Ids]], name: str) -> list[float]:
    prompts = list(dict.fromkeys(prompt for prompt, _ in items))
    rows = Rows.read(model, prompts, name).pick([prompts.index(prompt) for prompt, _ in items])
    vocabulary, device = rows.logits.shape[-1], rows.mask.device
    length = max(len(completion) for _, completion in items)
    tokens = torch.zeros(len(items), length, dtype=torch.long)
    kept = torch.zeros_like(tokens)
    for row, (_, completion) in enumerate(items):
        tokens[row, : len(completion)] = torch.tensor(completion)
        kept[row, : len(completion)] = 1
    known = tokens.clamp(max=vocabulary - 1).to(device)
    logits = rows.logits[:, None]
    if length > 1:
        mask = torch.cat([rows.mask, kept[:, :-1].to(device)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, rows.mask.shape[1] :]
        more = model(
            input_ids=known[:, :-1], attention_mask=mask, position_ids=positions, past_key_values=rows.cache, use_cache=True
        )
        logits = torch.cat([logits, more.logits], 1)
    found = []
    for row, (_, completion) in enumerate(items):  # one by one: float64 of the whole batch would be large
        law = logits[row, : len(completion)].to(torch.float64).log_softmax(-1)
        logp = float(law.gather(-1, known[row, : len(completion), None]).sum())
        if math.isnan(logp):
            raise ModelError("gives logits that are not numbers", where=name, fix="check the weights and the dtype")
        found.append(logp if max(completion) < vocabulary else -math.inf)
    return found
