"""The Python of docs/preference_models.md runs as it is written, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fakes import byte_tokenizer, saved_llama

PAGE = Path(__file__).parents[2] / "docs" / "preference_models.md"


def test_the_blocks_run_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.S | re.M))
    changes = {
        '"HuggingFaceTB/SmolLM2-135M-Instruct"': '"model"',
        '("packaged:pandalm-human")': '("packaged:pandalm-human", limit=8)',
        'load_cross_encoder("runs/gold")': 'load_cross_encoder("runs/g")',
        "folds=5": "folds=2",
    }
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    saved_llama(tmp_path / "model", byte_tokenizer())
    names: dict[str, Any] = {}
    exec(code, names)
    ready, found = names["ready"], names["found"]
    assert len(ready) == 8 and all(len(record.auxiliary_probability) == 4 for record in ready)
    assert 0 <= found.rate.mean <= 1 and found.prompts == 1
