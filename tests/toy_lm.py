"""Autoregressive language models small enough to enumerate, so that expectations over completions and pairs are exact.

Token 0 ends a completion. A completion that reaches `length` tokens without it is cut: an atom without the end factor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

END = 0


def completions(vocabulary: int, length: int) -> list[tuple[int, ...]]:
    """Every completion, ended or cut."""
    open_prefixes: list[tuple[int, ...]] = [()]
    ended = []
    for _ in range(length):
        ended += [prefix + (END,) for prefix in open_prefixes]
        open_prefixes = [prefix + (token,) for prefix in open_prefixes for token in range(vocabulary) if token != END]
    return ended + open_prefixes


class GruLM(nn.Module):
    """A recurrent language model: (prompts (N,), tokens (N, T)) -> logits (N, T, V), position t predicting token t."""

    def __init__(self, vocabulary: int, prompts: int, seed: int, hidden: int = 8, spread: float = 0.8) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.vocabulary = vocabulary
        self.embedding = nn.Embedding(prompts + vocabulary, hidden)
        self.gru = nn.GRU(hidden, hidden, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)
        self.to(torch.float64)
        nn.init.normal_(self.head.weight, std=spread)

    def forward(self, prompts: Tensor, tokens: Tensor) -> Tensor:
        inputs = torch.cat([self.vocabulary + prompts[:, None], tokens[:, :-1]], dim=1)
        return self.head(self.gru(self.embedding(inputs))[0])


class PrefixLM(nn.Module):
    """A language model with free logits for every (prompt, prefix): any distribution over completions is one of these."""

    def __init__(self, vocabulary: int, prompts: int, length: int) -> None:
        super().__init__()
        self.prompts, self.branches = prompts, vocabulary - 1
        states = prompts * sum(self.branches**depth for depth in range(length))
        self.table = nn.Embedding(states, vocabulary, dtype=torch.float64)
        nn.init.zeros_(self.table.weight)

    def forward(self, prompts: Tensor, tokens: Tensor) -> Tensor:
        states = [prompts]
        for token in tokens[:, :-1].T:
            states.append(self.prompts + states[-1] * self.branches + token.clamp(min=1) - 1)
        return self.table(torch.stack(states, dim=1))


def token_logps(model: nn.Module, vocabulary: int, length: int, prompts: int) -> tuple[Tensor, Tensor]:
    """Next-token log-probs (X, N, T, V) along every completion of every prompt, and its tokens (N, T), -1 beyond the end.

    Positions beyond the end hold what the model says there; they belong to no completion.
    """
    atoms = completions(vocabulary, length)
    tokens = torch.tensor([atom + (-1,) * (length - len(atom)) for atom in atoms])
    prompt_rows = torch.arange(prompts).repeat_interleave(len(atoms))
    logits = model(prompt_rows, tokens.clamp(min=0).repeat(prompts, 1))
    return logits.log_softmax(-1).view(prompts, len(atoms), length, vocabulary), tokens


def sum_over_tokens(logps: Tensor, tokens: Tensor) -> Tensor:
    """Sequence log-probs (X, N) from next-token log-probs (X, N, T, V) and tokens (N, T)."""
    scored = logps.gather(-1, tokens.clamp(min=0).expand(logps.shape[:-1])[..., None]).squeeze(-1)
    return scored.masked_fill(tokens < 0, 0.0).sum(-1)


def sequence_logps(model: nn.Module, vocabulary: int, length: int, prompts: int) -> Tensor:
    """Sequence log-probs (X, N) of every completion of every prompt."""
    return sum_over_tokens(*token_logps(model, vocabulary, length, prompts))


@dataclass
class World:
    """X prompts, N completions, K random references with a weight vector per prompt, a reward, and a law mu of completions."""

    members: int
    vocabulary: int
    length: int
    seed: int
    prompts: int = 2
    beta: float = 0.5
    logps: Tensor = field(init=False)
    weights: Tensor = field(init=False)
    reward: Tensor = field(init=False)
    mu: Tensor = field(init=False)

    def __post_init__(self) -> None:
        models = [GruLM(self.vocabulary, self.prompts, 100 * self.seed + i) for i in range(self.members + 1)]
        with torch.no_grad():
            *references, law = [self.score(model) for model in models]
        generator = torch.Generator().manual_seed(self.seed)
        self.logps = torch.stack(references, dim=-1)
        concentration = torch.rand(self.prompts, self.members, generator=generator, dtype=torch.float64) + 0.2
        self.weights = concentration / concentration.sum(-1, keepdim=True)
        self.reward = 2 * torch.rand(law.shape, generator=generator, dtype=torch.float64) - 1
        self.mu = law.exp()

    def score(self, model: nn.Module) -> Tensor:
        return sequence_logps(model, self.vocabulary, self.length, self.prompts)

    def policy(self) -> PrefixLM:
        return PrefixLM(self.vocabulary, self.prompts, self.length)


def minimise(parameters: list[Tensor], objective: Callable[[], Tensor], newton_steps: int = 40) -> None:
    """Descent in place to float64 stationarity: quasi-Newton to the neighbourhood, then Newton steps on |Hessian|.

    Where a policy holds far more than its anchor, forward KL leaves curvatures many orders apart, which stall quasi-Newton.
    """
    optimiser = torch.optim.LBFGS(
        parameters,
        max_iter=60 if newton_steps else 1000,
        history_size=50,
        tolerance_grad=1e-9,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = objective()
        value.backward()
        return value

    optimiser.step(closure)
    for _ in range(newton_steps):
        if not _newton_step(parameters, objective):
            break


def _newton_step(parameters: list[Tensor], objective: Callable[[], Tensor]) -> bool:
    """One step against the gradient through |Hessian|, halved until the objective falls. False at the floor of float64."""
    value = objective()
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, create_graph=True)])
    rows = torch.autograd.grad(slope, parameters, torch.eye(len(slope), dtype=slope.dtype), is_grads_batched=True)
    hessian = torch.cat([row.reshape(len(slope), -1) for row in rows], dim=1)
    curvature, basis = torch.linalg.eigh(0.5 * (hessian + hessian.mT))
    curved = curvature.abs() > 1e-13 * curvature.abs().max()
    step = -(basis[:, curved] / curvature[curved].abs()) @ (basis[:, curved].mT @ slope.detach())
    start = torch.nn.utils.parameters_to_vector(parameters).detach()
    with torch.no_grad():
        for halvings in range(20):
            torch.nn.utils.vector_to_parameters(start + 0.5**halvings * step, parameters)
            if objective() < value:
                return True
        torch.nn.utils.vector_to_parameters(start, parameters)
    return False


def total_variation(p: Tensor, q: Tensor) -> float:
    """The largest total variation over prompts of two distributions (X, N)."""
    return 0.5 * (p - q).abs().sum(-1).max().item()
