"""The lines of a training in metrics.jsonl, whatever a kill left of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polyref import files, stages
from polyref.loops.policies import Policy
from polyref.loops.train import Training, train
from polyref.references.reference_set import Reference, ReferenceSet
from polyref.scoring.models import ModelSource
from polyref.stages import RunFolder
from polyref.training.config import PreferenceConfig

ROWS = [
    {"round": 0, "step": 0, "eval_reward": [1.0, None, None]},
    *({"round": 1, "step": step, "loss": 1.0 / step} for step in (1, 2, 3)),
    {"round": 1, "step": 3, "eval_reward": [2.0, None, None]},
    {"round": 2, "step": 1, "loss": 0.25},
]


def again(folder: RunFolder) -> None:
    """Take up round 1, whose training is done."""
    source = ModelSource("nobody")
    settings: Any = PreferenceConfig
    how = Training(ReferenceSet((Reference("nobody"),)), source, settings, None, [], lambda what, done, total: None)
    train(folder, folder.stage("train-1"), {}, Policy(source), [], 1.0, how, 1)


@pytest.mark.parametrize("gone", [[1, 2, 3], [2, 3], [1], [2], [2, 3, 4, 5]])
def test_lines_of_a_done_training_come_back_whole_and_in_their_place(
    gone: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunFolder(tmp_path / "run", {}) as folder:
        stage = folder.stage("train-1")
        outputs = [stage.folder / name for name in ("model", "training.json", "metrics.json")]
        outputs[0].mkdir()
        files.write_bytes(outputs[0] / "weights", b"some")
        files.write_bytes(outputs[1], b"{}")
        folder.write_metrics(ROWS[1:4])
        files.write_bytes(outputs[2], folder.metrics_path.read_bytes().strip().replace(b"\n", b", ").join((b"[", b"]")))
        stage.finish(outputs)
        folder.write_metrics(row for number, row in enumerate(ROWS) if number not in gone)
        writes = list[Path]()
        monkeypatch.setattr(
            stages, "write_bytes", lambda path, content: (writes.append(path), files.write_bytes(path, content))
        )
        monkeypatch.setattr(RunFolder, "append_metrics", lambda *_: pytest.fail("a kill could fall between two lines"))
        again(folder)
        again(folder)
        assert folder.read_metrics() == [row for number, row in enumerate(ROWS) if number in (1, 2, 3) or number not in gone]
        assert writes.count(folder.metrics_path) == 1, "all at once, and once"
