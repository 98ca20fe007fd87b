"""References and reference sets: which models the policy is kept close to, how much each counts, and how they compose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from polyref.errors import ConfigError, ReferenceSetError
from polyref.references.compose import COMPOSITIONS, check_support, check_weights
from polyref.scoring.models import DTYPES, ModelSource

if TYPE_CHECKING:
    from torch import Tensor

Composition = Literal["geometric", "arithmetic"]
"""How K references become one anchor, at the sequence level."""


@dataclass(frozen=True)
class Reference:
    """One reference: a model, with or without adapter, under its own tokenizer, system prompt and dtype.

    Args:
        model: hub id, folder, or a transformers causal language model in memory.
        adapter: folder or hub id of a PEFT adapter switched on while this reference scores.
        tokenizer: hub id, folder or tokenizer; by default the one kept with the model (the policy's for a model in memory).
        system_prompt: put before every conversation this reference sees. One set of weights under K system prompts is K
            references.
        dtype: of the weights while scoring: float32 (the default), bfloat16, float16 or float64. A model in memory is scored in
            its own, and another one is refused.
        gguf_file: a GGUF file inside `model`, dequantised on loading.
        name: what reports and logs call it; by default made from the parts.
        revision: of the hub repository.
        trust_remote_code: run code that comes with the model. Off unless you turn it on.
    """

    model: Any
    adapter: str | Path | None = None
    tokenizer: Any = None
    system_prompt: str | None = None
    dtype: str | None = None
    gguf_file: str | None = None
    name: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.model, str) and not self.model.strip():
            raise ReferenceSetError("a reference has an empty model name", fix="give a hub id or a folder")
        if self.dtype is None:
            return
        if self.dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {self.dtype!r} of a reference", fix=f"use one of {', '.join(DTYPES)}")
        if self.in_memory and self.scoring_dtype != self.dtype:
            what = f"a reference in memory has weights of dtype {self.scoring_dtype}, not {self.dtype}"
            raise ConfigError(what, fix=f"convert it with model.to(torch.{self.dtype}), or leave dtype out")

    @property
    def in_memory(self) -> bool:
        """Whether `model` is a module rather than a name."""
        return not isinstance(self.model, str | Path)

    @property
    def source(self) -> ModelSource:
        """Where the weights come from. Members with equal sources share one loaded model."""
        return ModelSource(str(self.model), self.gguf_file, self.scoring_dtype, self.revision, self.trust_remote_code)

    @property
    def scoring_dtype(self) -> str:
        """The dtype it scores in: `dtype`, by default float32; its own where the model is in memory already."""
        if self.in_memory:
            return str(next(self.model.parameters()).dtype).removeprefix("torch.")
        return self.dtype or "float32"

    @property
    def label(self) -> str:
        """`name`, or a short description made from the parts."""
        if self.name:
            return self.name
        parts = [type(self.model).__name__ if self.in_memory else Path(str(self.model)).name]
        if self.adapter:
            parts.append(f"adapter {Path(str(self.adapter)).name}")
        if self.system_prompt:
            words = " ".join(self.system_prompt.split())
            parts.append(f"system prompt {words[:32] + '…' if len(words) > 33 else words!r}")
        return ", ".join(parts)


@dataclass(frozen=True)
class ReferenceSet:
    """K references and their composition into one anchor.

    geometric: log G_a(y|x) = sum_i a_i log pi_i(y|x) - log F_a(x); the prompt-only log F_a cancels between two completions and
    is left out. arithmetic: log M_a(y|x) = logsumexp_i(log a_i + log pi_i(y|x)). Both at the sequence level [arXiv 2502.01203].

    Args:
        members: the references.
        weights: a, one number a member, at least 0, of sum 1; uniform by default. A prompt's own `reference_weights` win over
            them.
        composition: "geometric" or "arithmetic".

    Raises ReferenceSetError when there is no member, counts differ, or weights are off the simplex.
    """

    members: tuple[Reference, ...]
    weights: tuple[float, ...] | None = None
    composition: Composition = "geometric"

    def __post_init__(self) -> None:
        members = (self.members,) if isinstance(self.members, Reference) else tuple(self.members)
        if not members:
            raise ReferenceSetError("a reference set has no member", fix="give at least one reference, or none at all")
        if self.composition not in COMPOSITIONS:
            raise ReferenceSetError(f"unknown composition {self.composition!r}", fix="use geometric or arithmetic")
        weights = tuple(self.weights) if self.weights is not None else (1 / len(members),) * len(members)
        check_weights(weights, members=len(members))
        object.__setattr__(self, "members", members)
        object.__setattr__(self, "weights", weights)

    def __len__(self) -> int:
        return len(self.members)

    def needed(self, weights: Tensor | None = None) -> tuple[bool, ...]:
        """Which members count at all: those of positive weight, in any row of `weights` (..., K) where prompts have theirs."""
        if weights is None:
            return tuple(a > 0 for a in self.weights or ())
        return tuple((weights.reshape(-1, len(self)) > 0).any(0).tolist())

    def anchor(self, logps: Tensor, weights: Tensor | None = None, *, places: Sequence[str] | None = None) -> Tensor:
        """Anchor log-probabilities, up to a term of the prompt alone: (..., K) in nats -> (...).

        `weights` (..., K) replaces the set's own where prompts have theirs. Raises ReferenceSetError on NaN, on weights off the
        simplex, and on completions without support: under geometric composition those to which a member of positive weight
        gives no mass, under arithmetic those to which all do; `places` says where each entry of the first axis comes from.
        """
        import torch

        a = weights if weights is not None else torch.tensor(self.weights, dtype=torch.float64)
        compose = COMPOSITIONS[self.composition]
        check_support(logps, a, compose, places=places, names=[member.label for member in self.members])
        return compose(logps, a)
