"""Multi-step rejection sampling on models that can be enumerated: it ends near the exact tilt, and only against its anchor."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PhiConfig, PhiForCausalLM

from fakes import word_tokenizer
from polyref.cli.loop_settings import LoopPrompts
from polyref.cli.multistep import make_multistep
from polyref.cli.multistep_settings import MultistepSettings
from polyref.data.prompt_rows import PromptRow
from polyref.loops import multistep as loop
from polyref.loops.accept import Acceptance, accept
from polyref.loops.generate import Proposal, Proposed
from polyref.loops.policies import Policy
from polyref.references.compose import COMPOSITIONS
from polyref.references.reference_set import Reference, ReferenceSet
from polyref.rewards.functions import from_function
from polyref.scoring.models import ModelSource

LENGTH, BETA, PROMPTS, WEIGHTS = 3, 0.5, ("x", "y"), (0.6, 0.4)
TOKENIZER = word_tokenizer(["x", "y", "Ġa", "Ġb"], chat_template=None)
LETTERS = TOKENIZER.convert_tokens_to_ids(["Ġa", "Ġb"])
END = TOKENIZER.eos_token_id
BODIES = [body for size in range(LENGTH) for body in itertools.product(LETTERS, repeat=size)]
SUPPORT = [(*body, END) for body in BODIES] + list(itertools.product(LETTERS, repeat=LENGTH))
REWARD = from_function(lambda prompt, text: text.count("a") * (1.0 if prompt == "x" else -0.5), "letters", "1")


def saved(folder: Path, seed: int) -> Path:
    """A model that gives two letters and the end, and nothing else, as save_pretrained writes it."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"pad_token_id": TOKENIZER.pad_token_id, "bos_token_id": None, "eos_token_id": END}
    model = PhiForCausalLM(
        PhiConfig(vocab_size=len(TOKENIZER), max_position_embeddings=32, initializer_range=0.5, **sizes, **special)
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(0.4)
        model.lm_head.bias.fill_(-1e4)[[END, *LETTERS]] = 0.0
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@torch.no_grad()
def logps(folder: Path) -> torch.Tensor:
    """log pi(y | x) of the model in `folder` (X, Y) over SUPPORT, in float64."""
    model: Any = Policy(ModelSource(str(folder), dtype="float64")).load()
    found = []
    for prompt, y in itertools.product(TOKENIZER(list(PROMPTS))["input_ids"], SUPPORT):
        law = model(input_ids=torch.tensor([[*prompt, *y]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found.append(law[torch.arange(len(y)), list(y)].sum())
    return torch.stack(found).view(len(PROMPTS), len(SUPPORT))


def text_of(y: tuple[int, ...]) -> str:
    return str(TOKENIZER.decode([token for token in y if token != END]))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("enumerable")
    return [saved(folder / str(seed), seed) for seed in (1, 2)]


def target(models: list[Path], composition: str = "geometric") -> torch.Tensor:
    """The tilt at BETA of the composition (X, Y)."""
    anchor = COMPOSITIONS[composition](
        torch.stack([logps(one) for one in models], -1), torch.tensor(WEIGHTS, dtype=torch.float64)
    )
    reward = torch.tensor([[REWARD([x], [text_of(y)]).item() for y in SUPPORT] for x in PROMPTS], dtype=torch.float64)
    return (anchor + reward / BETA).softmax(-1)


def distance(policy: Path, law: torch.Tensor) -> float:
    """Total variation, the largest over prompts."""
    return float(0.5 * (logps(policy).exp() - law).abs().sum(-1).max())


def stepped(models: list[Path], run: Path, composition: Any = "geometric", **changes: Any) -> dict[str, Any]:
    references = ReferenceSet(tuple(Reference(str(model), name=model.name) for model in models), WEIGHTS, composition)
    usual: dict[str, Any] = {"beta": BETA, "steps": 2, "proposals": 500, "keep": 250, "pairs": 150, "max_new_tokens": LENGTH}
    usual |= {"batch_size": 500, "eval_completions": 300}
    data = run.parent / "prompts.jsonl"
    data.write_text("".join(f'{{"prompt": "{prompt}"}}\n' for prompt in PROMPTS))
    own = MultistepSettings(str(run), str(models[0]), references=references, **usual | changes)
    training = {"learning_rate": 0.01, "num_train_epochs": 25, "per_device_train_batch_size": 75, "weight_decay": 0.0}
    training |= {"cache_dir": str(run.parent / "cache"), "save_strategy": "no", "logging_steps": 20}
    return make_multistep(own, LoopPrompts(str(data)), training, reward=REWARD, gold=REWARD)


SLOW = (pytest.mark.slow, pytest.mark.ci)


@pytest.mark.parametrize(
    ("composition", "changes"),
    [
        pytest.param("geometric", {}, id="equal"),
        pytest.param("arithmetic", {"correct": True, "r_max": 3.0}, id="corrected", marks=SLOW),
        pytest.param("geometric", {"acceptance": 0.6, "steps": None}, id="adapted", marks=SLOW),
    ],
)
def test_steps_end_near_the_tilt_of_the_original_references(
    models: list[Path], tmp_path: Path, composition: str, changes: dict[str, Any]
) -> None:
    summary = stepped(models, tmp_path / "run", composition, **changes)
    law, rows = target(models, composition), summary["steps"]
    start, end = distance(models[0], law), distance(tmp_path / "run" / "model", law)
    assert summary["reached"] and rows[-1]["beta"] == BETA and end < 0.1 < 0.3 < start  # 0.05 to 0.09 over seeds
    halfway = distance(tmp_path / "run" / "stages" / "train-1" / "model", law)
    assert end < halfway < start
    reward = torch.tensor([[REWARD([x], [text_of(y)]).item() for y in SUPPORT] for x in PROMPTS])
    policy = logps(tmp_path / "run" / "model")
    mean, low, high = rows[-1]["reward"]
    assert mean == pytest.approx(float((policy.exp() * reward).sum(-1).mean()), abs=0.15)
    anchor = COMPOSITIONS[composition](
        torch.stack([logps(one) for one in models], -1), torch.tensor(WEIGHTS, dtype=torch.float64)
    )
    kl = (policy.exp() * (policy - anchor)).sum(-1).mean()
    assert rows[-1]["kl"][0] == pytest.approx(float(kl), abs=0.1)
    assert rows[0]["win_rate"][0] == 0.5 < rows[-1]["win_rate"][0] and rows[-1]["gold"] == rows[-1]["reward"]


def test_an_anchor_that_moves_misses_the_tilt(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = loop.train

    def moved(folder: Any, stage: Any, inputs: Any, policy: Policy, *rest: Any) -> Any:
        *most, how, number = rest
        anchor = ReferenceSet((Reference(policy.source.model),)) if number > 1 else how.references
        return train(folder, stage, inputs, policy, *most, replace(how, references=anchor), number)

    monkeypatch.setattr(loop, "train", moved)
    stepped(models, tmp_path / "run")
    assert distance(tmp_path / "run" / "model", target(models)) > 0.1


def test_what_a_step_took_is_counted(models: list[Path], tmp_path: Path) -> None:
    summary = stepped(models, tmp_path / "run", steps=2, proposals=12, keep=6, pairs=4, eval_completions=2)
    first, second = summary["steps"][1:]
    assert second["proposals"] == second["scored"] == 24 and first["proposals"] >= first["scored"] == 24
    assert summary["proposals"] == first["proposals"] + 24 and 0 < second["tokens"] <= 24 * LENGTH
    assert summary["tokens"] == first["tokens"] + second["tokens"]
    for row in (first, second):
        assert 2 <= row["kept"] <= 12 and row["pairs"] == row["train_pairs"] <= 8
        assert 0 <= row["acceptance"][1] <= row["acceptance"][0] <= row["acceptance"][2] <= 1


def test_proposals_of_a_wrong_fit_are_corrected(models: list[Path]) -> None:
    references = ReferenceSet(tuple(Reference(str(model)) for model in models), WEIGHTS)
    fitted, each = logps(models[0]), torch.stack([logps(one) for one in models], -1)
    rng = np.random.default_rng(0)
    kept: dict[bool, np.ndarray] = {}
    for correct in (True, False):
        drawn = rng.choice(len(SUPPORT), 4000, p=fitted[0].exp().numpy() / float(fitted[0].exp().sum()))
        rewards = [REWARD([PROMPTS[0]], [text_of(y)]).item() for y in SUPPORT]
        own, others = fitted[0].tolist(), each[0].tolist()
        proposals = tuple(Proposal("", 1, True, own[y], tuple(others[y]), rewards=(rewards[y],)) for y in drawn.tolist())
        how = Acceptance(BETA, 2 * BETA, 2000, None, 0, references if correct else None)
        found = accept(PromptRow(PROMPTS[0]), Proposed(proposals, 4000, 4000), how)
        assert found is not None and not found.exact
        kept[correct] = np.bincount(drawn[found.indices.numpy()], minlength=len(SUPPORT)) / len(found.indices)
    law = target(models)[0].numpy()
    far = {correct: 0.5 * np.abs(share - law).sum() for correct, share in kept.items()}
    assert far[True] < 0.1 and far[False] > 0.2


def test_a_prompt_without_proposals_keeps_none(models: list[Path]) -> None:
    assert accept(PromptRow("x"), Proposed((), 0, 0), Acceptance(1.0, None, 2, None, 0)) is None
