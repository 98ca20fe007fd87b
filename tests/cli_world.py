"""A small world for the command line: a tiny model, some pairs, and a way to see what a verb leaves behind."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from polyref.cli.main import main


def some_rows(count: int = 12) -> list[dict[str, Any]]:
    """Pairs over 6 prompts (each twice, where there are 12)."""
    return [{"prompt": f"question {i % 6}?", "chosen": f"yes, {i}", "rejected": f"no {i}"} for i in range(count)]


@dataclass
class Outcome:
    """How a verb ended, and what it wrote."""

    code: int
    out: str
    err: str


@dataclass
class World:
    """A folder to work in, and the words of commands about what is in it."""

    path: Path
    model: Path
    capsys: Any
    environment: dict[str, str] = field(default_factory=dict)

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def pairs(self, *rows: Any, name: str = "pairs.jsonl") -> Path:
        """A .jsonl file of `rows`, or of `some_rows`."""
        return self.file(name, "".join(json.dumps(row) + "\n" for row in rows or some_rows()))

    def train(self, **settings: Any) -> list[str]:
        """`polyref train` of one epoch with `settings` over the usual ones; None leaves a setting out."""
        usual = {"model": self.model, "output_dir": self.path / "run", "per_device_train_batch_size": 4, "num_train_epochs": 1}
        return self._words("train", usual | settings)

    def reward(self, **settings: Any) -> list[str]:
        """`polyref reward` of one epoch with `settings` over the usual ones; None leaves a setting out."""
        usual = {"model": self.model, "output_dir": self.path / "run", "per_device_train_batch_size": 4, "num_train_epochs": 1}
        return self._words("reward", usual | settings)

    def score(self, **settings: Any) -> list[str]:
        """`polyref score` under one reference, the model itself."""
        usual = {"model": self.model, "references": {"members": [{"model": str(self.model)}]}}
        return self._words("score", usual | settings)

    def auxiliary(self, **settings: Any) -> list[str]:
        """`polyref auxiliary` of one pair of short completions a prompt, from the model itself, by the length of texts."""
        usual = {
            "output_dir": self.path / "auxiliary",
            "sampling_policy": {"members": [{"model": str(self.model)}]},
            "reward": {"model": "rule:length"},
            "pairs": 2,
            "max_new_tokens": 40,
            "prompts_at_once": 2,
        }
        return self._words("auxiliary", usual | settings)

    def sample(self, **settings: Any) -> list[str]:
        """`polyref sample` of short completions from the model under two system prompts, composed geometrically."""
        members = [{"model": str(self.model)}, {"model": str(self.model), "system_prompt": "be brief", "name": "brief"}]
        usual = {
            "output_dir": self.path / "sample",
            "references": {"members": members},
            "prompt_format": "chat",
            "n": 4,
            "max_new_tokens": 6,
            "prompts_at_once": 2,
        }
        return self._words("sample", usual | settings)

    def multistep(self, **settings: Any) -> list[str]:
        """`polyref multistep` of two steps towards long completions, from the model under two system prompts."""
        members = [{"model": str(self.model)}, {"model": str(self.model), "system_prompt": "be brief", "name": "brief"}]
        usual = {
            "model": self.model,
            "output_dir": self.path / "multistep",
            "references": {"members": members},
            "prompt_format": "chat",
            "reward": {"model": "rule:length:characters"},
            "beta": 2,
            "steps": 2,
            "proposals": 8,
            "keep": 6,
            "max_new_tokens": 6,
            "prompts_at_once": 2,
            "held_out": 2,
            "eval_completions": 2,
            "per_device_train_batch_size": 8,
            "num_train_epochs": 1,
            "learning_rate": 0.01,
        }
        return self._words("multistep", usual | settings)

    def iterate(self, **settings: Any) -> list[str]:
        """`polyref iterate` of two rounds towards long completions, from the model under two system prompts."""
        members = [{"model": str(self.model)}, {"model": str(self.model), "system_prompt": "be brief", "name": "brief"}]
        usual = {
            "model": self.model,
            "output_dir": self.path / "iterate",
            "references": {"members": members},
            "prompt_format": "chat",
            "reward": {"model": "rule:length:characters"},
            "beta": 2,
            "rounds": 2,
            "completions": 3,
            "max_new_tokens": 6,
            "prompts_at_once": 2,
            "held_out": 2,
            "eval_completions": 2,
            "per_device_train_batch_size": 4,
            "num_train_epochs": 1,
            "learning_rate": 0.01,
        }
        return self._words("iterate", usual | settings)

    def validate(self, **settings: Any) -> list[str]:
        """`polyref validate` with the model's tokenizer."""
        return self._words("validate", {"model": self.model} | settings)

    def under(self, *members: Mapping[str, Any], **others: Any) -> list[str]:
        """`polyref score` under `members`, each the model itself with some of its settings changed."""
        whole = [{"model": str(self.model)} | {k: _plain(v) for k, v in member.items()} for member in members]
        return self.score(references={"members": whole} | others)

    def _words(self, verb: str, settings: dict[str, Any]) -> list[str]:
        if "data" not in settings:
            path = self.path / "pairs.jsonl"
            settings["data"] = path if path.exists() else self.pairs()
        given = {name: value for name, value in settings.items() if value is not None}
        return [verb, *(word for name, value in given.items() for word in (f"--{name}", _word(value)))]

    def run(self, words: Sequence[object]) -> Outcome:
        """Run `polyref WORDS` in this process."""
        self.capsys.readouterr()
        code = main([str(word) for word in words])
        return Outcome(code, *self.capsys.readouterr())

    def tree(self) -> dict[str, bytes | None]:
        """All files and folders below `path`, with their bytes."""
        return {str(p.relative_to(self.path)): p.read_bytes() if p.is_file() else None for p in sorted(self.path.rglob("*"))}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _word(value: Any) -> str:
    return str(value) if isinstance(value, str | Path) else json.dumps(value)


def table(cases: Mapping[str, Sequence[Any]]) -> pytest.MarkDecorator:
    """Parametrise over `cases`: the name of a bad input -> (what is given, and texts that the line of its refusal holds)."""
    return pytest.mark.parametrize(
        ("given", "says"), [pytest.param(case[0], case[1:], id=name) for name, case in cases.items()]
    )


def assert_refused(world: World, words: Sequence[object], says: Sequence[str]) -> None:
    """`polyref WORDS` ends with exit code 2 and one line that holds `says`, and leaves every file and folder as it was."""
    before = world.tree()
    outcome = world.run(words)
    assert_one_line(outcome, says)
    assert world.tree() == before
    assert words[0] == "validate" or not outcome.out


def assert_ends_in_one_line(outcome: Outcome, *says: str) -> None:
    """As `assert_one_line`, after the progress of work that was begun."""
    assert_one_line(Outcome(outcome.code, outcome.out, outcome.err.splitlines()[-1] if outcome.err else ""), says)


def assert_one_line(outcome: Outcome, says: Sequence[str]) -> None:
    """Exit code 2; where, what and the remedy on one printable line, and nothing else."""
    assert outcome.code == 2, outcome.err
    (line,) = outcome.err.splitlines()
    assert line.startswith("polyref: ") and "; " in line, line
    assert line.isprintable() and len(line) < 700, line
    for text in says:
        assert text in line, line
