"""The examples run, leave what they promise, and do not do finished work again."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from polyref.errors import RunFolderError

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def pocket_policy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pocket_policy", EXAMPLES / "pocket_policy.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.ci
def test_pocket_policy_makes_a_base_and_two_references_once(
    pocket_policy: ModuleType, shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    arguments = ["--output_dir", str(tmp_path), "--data", str(shared_data), "--steps", "5"]
    pocket_policy.main(arguments)

    weights = {}
    for name in pocket_policy.POLICIES:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        assert model.num_parameters() == metrics["parameters"] <= 3_000_000
        assert model.config.max_position_embeddings >= 512 and model.config.vocab_size == len(tokenizer)
        assert math.isfinite(metrics["train_loss"]) and metrics["steps"] == 5
        assert metrics["held_out/hh-harmless-base/chosen"]["loss"] < math.log(len(tokenizer)) + 0.1
        weights[name] = model.get_input_embeddings().weight
    assert not torch.equal(weights["base"], weights["harmless"])
    assert not torch.equal(weights["harmless"], weights["helpful"])

    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    capsys.readouterr()
    pocket_policy.main(arguments)
    assert capsys.readouterr().out.count("already in") == 3
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    with pytest.raises(RunFolderError, match="seed 0 -> 1"):
        pocket_policy.main([*arguments, "--seed", "1"])


def test_pocket_tokenizer_writes_conversations_that_end(pocket_policy: ModuleType, tmp_path: Path) -> None:
    pocket_policy.build_tokenizer(["user\nHow are you?", "assistant\nFine, thanks."], vocab_size=300).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "Näme three – 果物!"}, {"role": "assistant", "content": "\nPear\n"}]
    full = tokenizer.apply_chat_template(messages, return_dict=False)
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert full.count(tokenizer.eos_token_id) == 2 and full[0] == tokenizer.bos_token_id
    assert "Näme three – 果物!" in tokenizer.decode(full)
    assert tokenizer("text").input_ids[0] == tokenizer.bos_token_id
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")


def test_pocket_policy_holds_out_whole_conversations(pocket_policy: ModuleType, shared_data: Path) -> None:
    for train, held_out in pocket_policy.load_corpora(shared_data).values():
        openings = [{record.prompt[0]["content"] for record in part} for part in (train, held_out)]
        assert train and held_out and not openings[0] & openings[1]


def test_training_is_the_same_for_the_same_seed_and_lowers_the_loss(pocket_policy: ModuleType) -> None:
    tokenizer = pocket_policy.build_tokenizer(["user\nab", "assistant\nba"], vocab_size=264)
    samples = [pocket_policy.Sample((1, *tokenizer.encode(text), 3), 2) for text in ("abab", "baba", "aabb", "abba")]
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = pocket_policy.build_model(tokenizer, hidden_size=32, layers=1)
        before = pocket_policy.evaluate(model, samples, samples)["loss"]
        pocket_policy.train_sft(model, samples, tokens=2000, seed=0)
        runs.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
        assert pocket_policy.evaluate(model, samples, samples)["loss"] < before
    assert torch.equal(*runs)
