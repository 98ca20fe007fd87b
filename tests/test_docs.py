"""What the documents say about the code is true: names exist, tables are complete, commands are the ones CI runs."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from fakes import byte_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
TREE_ROOMS = ("src/polyref", "examples", "benchmarks", "configs")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def resolve(dotted: str) -> Any:
    """The object at `dotted`: the longest importable prefix, then attributes."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[cut:]:
            found = getattr(found, attribute)
        return found
    raise AssertionError(f"{dotted} does not exist")


def first_column(text: str) -> dict[str, str]:
    """The rows of every table in `text` by the back-quoted name in their first column."""
    rows = re.findall(r"^\| (`.+?`(?:, `.+?`)*) \|(.*)\|$", text, flags=re.M)
    return {name: rest for names, rest in rows for name in re.findall(r"`(.+?)`", names)}


def test_the_two_commands_are_what_ci_runs() -> None:
    commands = re.findall(r"^pip install .*$", read("README.md"), flags=re.M)
    assert len(commands) == 2
    assert all(f'="{command}"\n' in read(".ci/run") for command in commands)


def test_the_tree_names_every_file_with_a_comment() -> None:
    tree = re.search(r"```text\n(polyref/\n.*?)```", read("README.md"), flags=re.S)
    assert tree
    named, folders = set(), []
    for line in tree[1].splitlines()[1:]:
        entry = re.fullmatch(r"((?:  )+)(\S+)(?:  +(\S.*))?", line)
        assert entry, line
        depth = len(entry[1]) // 2
        folders[depth - 1 :] = [entry[2]]
        assert entry[3] or entry[2].endswith("/"), f"no comment: {line}"
        named.add("".join(folders))
    missing = {name for name in named if not (ROOT / name).exists()}
    assert not missing
    files = (path for room in TREE_ROOMS for path in (ROOT / room).rglob("*.*") if path.suffix in (".py", ".yaml", ".html"))
    files = (path for path in files if path.name != "__init__.py")
    unnamed = {path.relative_to(ROOT).as_posix() for path in files} - named
    assert not unnamed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_are_python_and_import_what_exists(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.S | re.M):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("polyref"):
                for name in node.names:
                    resolve(f"{node.module}.{name.name}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_dotted_names_and_tests_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`(polyref(?:\.\w+)+)`", text):
        resolve(name)
    for file, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        source = read(file)
        assert not test or f"def {test}(" in source, f"{file} has no {test}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_stand_apart_from_the_paragraph_before_them(page: Path) -> None:
    blocks = re.split(r"\n\s*\n", page.read_text(encoding="utf-8"))
    torn = [block for block in blocks if re.search(r"^\| --- ", block, flags=re.M) and not block.lstrip().startswith("|")]
    assert not torn, "a table that goes on from a paragraph is shown as text"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.slow
@pytest.mark.ci
def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer(bos=False)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    for part in (LlamaForCausalLM(config), tokenizer):
        part.save_pretrained(tmp_path / "model")
    example = re.search(r"^```python\n(.*?)^```", read("README.md"), flags=re.S | re.M)
    assert example
    code, changes = example[1], {'"HuggingFaceTB/SmolLM2-135M-Instruct"': '"model"', "limit=80": "limit=40"}
    for old, new in changes.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("POLYREF_CACHE", "cache")
    exec(code, {})
    assert 0 <= float(capsys.readouterr().out.splitlines()[-1]) <= 1


def test_every_training_option_is_documented_with_its_default() -> None:
    from transformers import TrainingArguments

    from polyref import PreferenceConfig
    from polyref.training.likelihood_config import LikelihoodConfig
    from polyref.training.reward_config import RewardConfig

    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    pages = {PreferenceConfig: "training.md", RewardConfig: "rewards.md", LikelihoodConfig: "training_on_samples.md"}
    for config, page in pages.items():
        rows = first_column(read(f"docs/{page}"))
        for field in dataclasses.fields(config):
            if field.name not in inherited:
                default = "none" if field.default is None else f"`{str(field.default).lower()}`"
                assert rows[field.name].split(" | ")[0].strip() == default, field.name


def test_every_field_of_a_reference_is_documented() -> None:
    from polyref import Reference

    assert {field.name for field in dataclasses.fields(Reference)} <= first_column(read("docs/references.md")).keys()


def test_every_column_and_error_is_documented() -> None:
    from polyref import errors
    from polyref.types import PreferenceRecord

    columns = {field.name for field in dataclasses.fields(PreferenceRecord)} - {"source", "row"}
    assert columns <= first_column(read("docs/data.md")).keys()
    classes = {name for name, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, errors.PolyrefError)}
    assert classes - {"PolyrefError", "InputError"} <= first_column(read("docs/errors.md")).keys()


def test_every_verb_and_setting_is_documented() -> None:
    from polyref.cli import (
        auxiliary_settings,
        fit_settings,
        iterate_settings,
        lab,
        label_settings,
        plan,
        preference_source,
        quickstart,
        reward,
        sample_settings,
        score,
        settings,
        train,
        validate,
    )
    from polyref.cli.main import VERBS

    page = read("docs/cli.md")
    assert {f"polyref {verb}" for verb in VERBS} <= set(re.findall(r"^## `(.+)`$", page, flags=re.M))
    groups = (
        quickstart.QuickstartSettings,
        validate.ValidateSettings,
        score.ScoreSettings,
        train.PolicySettings,
        reward.RewardSettings,
        auxiliary_settings.AuxiliarySettings,
        preference_source.PreferenceSource,
        preference_source.CrossEncoderSettings,
        preference_source.RewardSource,
        sample_settings.SampleSettings,
        sample_settings.PromptSettings,
        fit_settings.FitSettings,
        fit_settings.SamplesSettings,
        label_settings.LabelSettings,
        label_settings.PairSettings,
        iterate_settings.IterateSettings,
        iterate_settings.EnhancerSettings,
        lab.LabSettings,
        plan.PlanSettings,
        settings.DataSettings,
        settings.LoraSettings,
    )
    for group in groups:
        rows = first_column(read("docs/data.md") if group is validate.ValidateSettings else page)
        missing = {field.name for field in dataclasses.fields(group)} - rows.keys()
        assert not missing, f"{group.__name__}: {missing}"


def test_every_experiment_is_documented() -> None:
    from polyref.theory.experiments import EXPERIMENTS

    rows = first_column(read("docs/lab.md"))
    assert list(EXPERIMENTS) == list(rows)


def test_each_experiment_has_found_one_sentence() -> None:
    from polyref.theory.experiments import EXPERIMENTS

    page = read("docs/lab_results/index.md")
    findings = dict(re.findall(r"^\| \[(\S+)\]\(#\S+\) \| [a-z ]+ \| (.*) \| [\d.]+ s \|$", page, flags=re.M))
    assert list(findings) == list(EXPERIMENTS)
    for name, finding in findings.items():
        assert re.fullmatch(r"Claimed: .+; measured .+; [^;]+\.", finding) and ". " not in finding, name


def test_what_is_quoted_of_the_lab_is_what_it_measured() -> None:
    page, measured = read("docs/preference_models.md"), read("docs/lab_results/index.md")
    quoted = re.findall(r"[\d.]+ \[[\d.]+, [\d.]+\]", page)
    assert len(quoted) == 5 * 6 + 6 * 2 and all(f"| {cell} |" in measured for cell in quoted)
