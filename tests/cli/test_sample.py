"""What `polyref sample` writes by each method and tilt, that its pairs train, and that a killed run ends alike."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from cli_world import World, assert_ends_in_one_line
from polyref.cli import sample_stages
from polyref.data.sources import load_preferences

Rows = list[dict[str, Any]]


def rows_of(file: Path) -> Rows:
    if file.suffix == ".parquet":
        return list(pq.read_table(file).to_pylist())
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in content.decode().splitlines()]


def written(world: World, run: str = "sample") -> dict[str, bytes]:
    files = [file for file in (world.path / run).rglob("*") if file.is_file() and file.name not in (".lock", "timing.json")]
    return {str(file.relative_to(world.path / run)): file.read_bytes() for file in files}


def drawn(world: World, **settings: Any) -> tuple[Rows, Rows, dict[str, Any]]:
    """The samples, the diagnostics and the summary of a run that ends well."""
    outcome = world.run(world.sample(**settings))
    assert outcome.code == 0, outcome.err
    run = Path(settings.get("output_dir", world.path / "sample"))
    summary = json.loads((run / "summary.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    samples, prompts = (rows_of(run / name) for name in summary["files"][:2])
    assert sum(row["samples"] for row in prompts) == len(samples) == summary["samples"]
    return samples, prompts, summary


@pytest.mark.parametrize(("method", "kind"), [("rejection", ".jsonl"), ("tokens", ".jsonl.gz"), ("smc", ".parquet")])
def test_a_geometric_composition_is_written_with_its_log_f(method: str, kind: str, world: World) -> None:
    samples, prompts, summary = drawn(world, method=method, file_name=f"drawn{kind}")
    assert [row["prompt"][0]["content"] for row in prompts] == [f"question {i}?" for i in range(6)], "each prompt once"
    assert summary["methods"] == {method: 6} and summary["files"] == [f"drawn{kind}", f"prompts{kind}"]
    assert all(row["exact"] == (method != "smc") for row in prompts)
    for row in prompts:
        low, high = row["log_f"][1:]
        assert row["log_f"][0] <= 0 and high <= 0 and (low is None or low <= row["log_f"][0])
        assert row["samples"] >= 4 and 0 < row["ess"] <= row["samples"] and row["calls"] > 0
    for sample in samples:
        assert sample["completion"][0]["role"] == "assistant" and len(sample["logps"]) == 2 and max(sample["logps"]) < 0
        assert sample["reward"] is None and (method == "smc" or sample["log_weight"] == 0)
    page = (world.path / "sample" / "report.html").read_text()
    assert "How much the references agree" in page and "Proposals against what was kept" in page


def test_one_model_and_a_mixture_are_drawn_from_prompts_alone(world: World) -> None:
    world.file("prompts.jsonl", "".join(json.dumps({"question": f"say {i}"}) + "\n" for i in (1, 2, 1, 3)))
    settings = {"data": world.path / "prompts.jsonl", "columns": {"prompt": "question"}, "prompt_format": "as_is", "limit": 2}
    one = {"members": [{"model": str(world.model)}]}
    samples, prompts, summary = drawn(world, references=one, temperature=0.7, **settings)
    assert summary["methods"] == {"engine": 2} and len(samples) == 8 and summary["log_f"] is None
    assert [(row["prompt"], row["row"], row["acceptance"]) for row in prompts] == [("say 1", 1, 1.0), ("say 2", 2, 1.0)]
    assert "How much the references agree" not in (world.path / "sample" / "report.html").read_text()
    members = [{"model": str(world.model)}, {"model": str(world.model), "system_prompt": "be brief"}]
    mixture = {"members": members, "composition": "arithmetic", "weights": [0.3, 0.7]}
    samples, prompts, summary = drawn(world, references=mixture, output_dir=world.path / "mixture", **settings)
    assert summary["methods"] == {"mixture": 2} and summary["exact_prompts"] == 2 and isinstance(samples[0]["completion"], str)


def test_rows_may_bring_weights_of_their_own(world: World) -> None:
    world.pairs({"prompt": "a", "reference_weights": [1, 0]}, {"prompt": "b", "reference_weights": [0.5, 0.5]})
    samples, prompts, _ = drawn(world, method="tokens", prompt_format="as_is")
    assert prompts[0]["acceptance"] == 1.0 and prompts[1]["log_f"][0] <= 0
    assert [sample["logps"][1] is None for sample in samples] == [True] * 4 + [False] * 4
    world.pairs({"prompt": "a", "reference_weights": [0.2, 0.3, 0.5]})
    refused = world.run(world.sample(prompt_format="as_is", output_dir=world.path / "other"))
    assert_ends_in_one_line(refused, "3 weights for 2 references")


def test_equal_prompts_under_other_weights_are_drawn_apart_however_prompts_are_parted(world: World) -> None:
    weights = ([1, 0], [0.5, 0.5], [0.4, 0.6])
    world.pairs(*({"prompt": "a", "reference_weights": own} for own in weights))
    settings = {"references": {"members": [{"model": str(world.model)}] * 2}, "method": "tokens", "prompt_format": "as_is"}
    by_one, _, _ = drawn(world, prompts_at_once=1, output_dir=world.path / "one", **settings)
    together, _, _ = drawn(world, prompts_at_once=3, output_dir=world.path / "three", **settings)
    texts = [sample["completion"] for sample in by_one]
    assert texts == [sample["completion"] for sample in together] and len(set(texts)) == len(texts) == 12
    world.pairs({"prompt": "a", "reference_weights": [1, 0]})
    alone, _, _ = drawn(world, output_dir=world.path / "alone", **settings)
    assert [sample["completion"] for sample in alone] == texts[:4], "one that occurs once"


def test_a_tilt_keeps_by_rejection_or_weighs_and_says_what_it_cost(world: World) -> None:
    reward = {"reward": {"model": "rule:length:characters"}, "beta": 4.0, "proposals": 24}
    plain, _, before = drawn(world, reward=reward["reward"])
    assert before["reward"] == {"model": "rule:length:characters", "mean": before["reward"]["mean"]}
    kept, prompts, exact = drawn(world, r_max=6.0, output_dir=world.path / "exact", **reward)
    assert all(sample["reward"] == len(sample["completion"][0]["content"]) for sample in plain + kept)
    assert exact["exact_prompts"] == 6 and all(row["samples"] <= 4 and row["log_z"] is not None for row in prompts)
    assert exact["noted_prompts"] == exact["short_prompts"] and all("6 bounds the reward" in row["note"] for row in prompts)
    assert all(0 < row["tilt_acceptance"][1] < row["tilt_acceptance"][2] <= 1 for row in prompts)
    settings = {"tilt": "importance", "output_dir": world.path / "weights"}
    weighed, prompts, weights = drawn(world, **settings, **reward)
    assert len(weighed) == 6 * 24 and weights["exact_prompts"] == 0 and all(row["ess"] < 24 for row in prompts)
    assert all("weighted" in row["note"] for row in prompts)
    for means in (exact["reward"]["mean"], weights["reward"]["mean"]):
        assert means > before["reward"]["mean"] - 1
    page = (world.path / "exact" / "report.html").read_text()
    assert "kept by the tilt" in page


def test_a_bound_that_is_exceeded_is_found_and_marked_and_no_error(world: World, caplog: pytest.LogCaptureFixture) -> None:
    reward = {"reward": {"model": "rule:length:characters"}, "beta": 4.0, "proposals": 24}
    _, prompts, summary = drawn(world, r_max=0.5, **reward)
    assert summary["exact_prompts"] == 0 and summary["noted_prompts"] == 6
    assert all("is above the r_max of 0.5 that was claimed" in row["note"] for row in prompts)
    assert "6 prompts are approximate or short; prompts.jsonl says why" in caplog.text
    _, prompts, _ = drawn(world, output_dir=world.path / "running", **reward)
    assert all("r_max is not known" in row["note"] for row in prompts)


def test_a_tilt_of_particles_takes_their_weights_and_pairs_are_of_resampled_ones(world: World) -> None:
    settings = {"method": "smc", "reward": {"model": "rule:length:characters"}, "beta": 4.0, "pairing": "best_worst"}
    samples, prompts, summary = drawn(world, proposals=16, **settings)
    assert all(row["log_z"] is None and row["samples"] >= 16 for row in prompts)
    assert len({sample["log_weight"] for sample in samples}) > 6 and 0 < summary["pairs"]["pairs"] <= 6
    assert math.fsum(math.exp(sample["log_weight"]) for sample in samples) == pytest.approx(len(samples))


def test_the_pairs_train(world: World) -> None:
    settings = {"reward": {"model": "rule:length:characters"}, "beta": 5.0, "pairing": "best_worst", "pairs": 2}
    samples, _, summary = drawn(world, proposals=24, file_name="samples.parquet", **settings)
    file = world.path / "sample" / "pairs.parquet"
    records = load_preferences(file)
    assert len(records) == summary["pairs"]["pairs"] > 0 and summary["files"][2] == "pairs.parquet"
    rewards = {json.dumps([one["prompt"], one["completion"]]): one["reward"] for one in samples}
    ended = {json.dumps([one["prompt"], one["completion"]]): one["ended"] for one in samples}
    assert False in ended.values(), "cut at max_new_tokens"
    for record in records:
        ends = [ended[json.dumps([record.prompt, text])] for text in (record.chosen, record.rejected)]
        assert [record.chosen_ended, record.rejected_ended] == ends
        chosen, rejected = (rewards[json.dumps([record.prompt, text])] for text in (record.chosen, record.rejected))
        assert chosen >= rejected and (record.chosen_probability == 0.5) == (chosen == rejected)
    trained = world.run(world.train(data=file, max_steps=1))
    assert trained.code == 0, trained.err


def test_a_run_killed_anywhere_ends_with_the_bytes_of_an_unbroken_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"reward": {"model": "rule:length:characters"}, "beta": 5.0, "pairing": "best_random", "proposals": 12}
    assert world.run(world.sample(**settings, output_dir=world.path / "unbroken")).code == 0
    words, keep, kills = world.sample(**settings, output_dir=world.path / "broken"), sample_stages.keep, 0

    def stop(file: Path, value: Any) -> None:
        keep(file, value)
        raise KeyboardInterrupt

    while True:
        with monkeypatch.context() as patch:
            patch.setattr(sample_stages, "keep", stop)
            outcome = world.run(words)
        if outcome.code == 0:
            break
        kills += 1
        assert outcome.code == 1 and kills < 9, outcome.err
    assert kills == 3, "three chunks"
    broken, unbroken = written(world, "broken"), written(world, "unbroken")
    names = {"report.html", "manifest.json"}  # the page has the folder's name on it, and the manifest the page's checksum
    assert broken.keys() == unbroken.keys() >= {"samples.jsonl", "prompts.jsonl", "pairs.jsonl"} | names
    assert all(broken[name] == unbroken[name] for name in broken.keys() - names)
    assert broken["report.html"] == unbroken["report.html"].replace(b"unbroken", b"broken")
    assert world.run(words).code == 0 and written(world, "broken") == broken


def test_the_recipe_opens_with_a_command_that_is_understood(world: World) -> None:
    recipe = Path(__file__).parents[2] / "configs" / "sample_two_prompts.yaml"
    command = recipe.read_text(encoding="utf-8").splitlines()[0].removeprefix("# polyref ")
    outcome = world.run([*command.replace(f"configs/{recipe.name}", str(recipe)).split(), "--print_config"])
    assert outcome.code == 0, outcome.err
    shown = yaml.safe_load(outcome.out)
    assert len(shown["references"]["members"]) == 2 and shown["method"] == "auto"
