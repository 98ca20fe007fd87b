"""Two processes that share the batch train and evaluate as one process that sees it whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fakes import byte_tokenizer, saved_llama

SCRIPT = """
import json, os, sys
from polyref import PreferenceConfig, PreferenceTrainer
from polyref.training.reward_config import RewardConfig
from polyref.training.reward_trainer import RewardTrainer
model, output, batch, kind, objective = sys.argv[1:]
rows = [{"prompt": "abcd", "chosen": " yes" + "!" * (i % 3), "rejected": " no" + "?" * (i % 2)} for i in range(16)]
if objective != "plain":
    drawn = [{"auxiliary_1": [" " + "x" * (i % 4 + 1), " y"], "auxiliary_2": [" z", " no" + "?" * (i % 3)]} for i in range(16)]
    said = [{"predicted_probability": i / 16, "auxiliary_probability": [0.3, 1 - i / 20]} for i in range(16)]
    rows = [row | a | b for row, a, b in zip(rows, drawn, said)]
common = {} if objective == "plain" else dict(control_coefficient="estimated")
common |= dict(
    output_dir=output, per_device_train_batch_size=int(batch), per_device_eval_batch_size=int(batch), max_steps=3,
    learning_rate=1e-2, logging_steps=1, use_cpu=True, objective=objective,
    save_strategy="no", report_to="none", disable_tqdm=True, optim="sgd",
    ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
)
if kind == "policy":
    trainer = PreferenceTrainer(model, None, PreferenceConfig(cache_dir=output + "/cache", **common), rows, rows[:11])
else:
    trainer = RewardTrainer(model, RewardConfig(**common), rows, rows[:11])
trainer.train()
evaluated, predicted = trainer.evaluate(), trainer.predict(trainer.eval_dataset).metrics
if trainer.is_world_process_zero():
    trainer.save_model(output + "/model")
    lines = [*(line for line in trainer.state.log_history if "loss" in line), evaluated, predicted]
    json.dump(lines, open(output + "/log.json", "w"))
if "WORLD_SIZE" in os.environ:  # threads of gloo that outlive the interpreter abort it, rarely
    import torch.distributed
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("kind", "objective"), [("policy", "plain"), ("policy", "variance_reduced"), ("reward", "variance_reduced")]
)
def test_two_processes_train_and_evaluate_like_one(tmp_path: Path, kind: str, objective: str) -> None:
    model = saved_llama(tmp_path / "base", byte_tokenizer())
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    outputs = {}
    for name, command, batch in (("one", [sys.executable], "8"), ("two", launcher, "4")):
        output = tmp_path / name
        output.mkdir()
        arguments = [*command, str(script), str(model), str(output), batch, kind, objective]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        outputs[name] = (load_file(output / "model" / "model.safetensors"), json.loads((output / "log.json").read_text()))
    (one, one_log), (two, two_log) = outputs["one"], outputs["two"]
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)
    averaged = {"rewards/margins"} | ({"logps/chosen"} if kind == "policy" else set())
    for line, other in zip(one_log[:3], two_log[:3], strict=True):
        terms = {name for name in line if name.startswith("vr/") and name != "vr/factor"}
        assert bool(terms) == (objective != "plain")
        for name in averaged | terms:
            assert other[name] == pytest.approx(line[name], rel=1e-5, abs=1e-5), name
    for line, other, prefix in zip(one_log[3:], two_log[3:], ("eval_", "test_"), strict=True):
        assert {prefix + name for name in averaged | {"loss"}} <= line.keys() == other.keys()
        for name in line.keys() - {"epoch"}:
            if not name.endswith(("_runtime", "_per_second")):
                assert other[name] == pytest.approx(line[name], rel=1e-4, abs=1e-4), name
