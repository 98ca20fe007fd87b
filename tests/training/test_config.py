"""Settings that contradict themselves are refused before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from polyref import PreferenceConfig
from polyref.data import truncate_pair
from polyref.errors import ConfigError
from polyref.objectives.pairwise import smoothed
from polyref.types import TokenizedPair


def config(folder: Path, **changes: Any) -> PreferenceConfig:
    return PreferenceConfig(output_dir=str(folder), use_cpu=True, report_to="none", **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"beta": 0.0},
        {"beta": -0.1},
        {"beta": float("nan")},
        {"beta": float("inf")},
        {"loss_type": "dpo"},
        {"loss_type": ["sigmoid"]},
        {"loss_type": "robust", "label_smoothing": 0.5},
        {"loss_type": "hinge", "label_smoothing": 0.1},
        {"loss_type": "sigmoid", "label_smoothing": -0.1},
        {"divergence": "sideways"},
        {"truncation_mode": "middle"},
        {"prompt_format": "html"},
        {"max_length": 1},
        {"max_length": 2.5},
        {"length_normalise": True, "divergence": "forward"},
        {"dr_beta": 1.0},
        {"dr_beta": 2.0, "gradient_accumulation_steps": 2},
        {"precompute_ref_log_probs": False},
        {"precompute_ref_batch_size": 0},
        {"remove_unused_columns": True},
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        config(tmp_path, **changes)
    assert "\n" not in str(error.value) and ";" in str(error.value), "what is wrong, and how to mend it"


def test_truncation_is_checked_as_where_pairs_are_cut(tmp_path: Path) -> None:
    pair = TokenizedPair((1,), (2,), (3,))
    given: list[dict[str, Any]] = [{"max_length": 1}, {"max_length": True}, {"truncation_mode": "middle"}]
    for changes in given:
        with pytest.raises(ConfigError) as setting:
            config(tmp_path, **changes)
        with pytest.raises(ConfigError) as cut:
            truncate_pair(pair, changes.get("max_length", 9), changes.get("truncation_mode", "keep_start"))
        assert str(setting.value) == str(cut.value)


def test_sigmoid_with_label_smoothing_is_the_smoothed_loss(tmp_path: Path) -> None:
    h = torch.tensor([-2.0, 0.0, 3.0])
    torch.testing.assert_close(config(tmp_path, label_smoothing=0.1).pair_loss()(h), smoothed(h, 0.1))


def test_the_usual_settings_are_good_ones(tmp_path: Path) -> None:
    usual = config(tmp_path)
    assert (usual.beta, usual.loss_type, usual.learning_rate, usual.divergence) == (0.1, "sigmoid", 1e-6, "reverse")
    assert usual.disable_dropout and usual.max_length == 1024 and not usual.remove_unused_columns
