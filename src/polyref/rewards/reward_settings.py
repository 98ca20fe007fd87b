"""What a reward model has to be read with, kept beside its weights: reward_model.json.

Weights alone do not say in which dtype they were trained, where texts were cut, how prompts were turned into messages, or by
what its rewards are divided before they are read as log-odds. `polyref reward` writes the file, `RewardModel.load` goes by it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from polyref.data.records import PROMPT_FORMATS
from polyref.data.truncate import check_truncation
from polyref.errors import ConfigError, ModelError, one_line
from polyref.files import write_bytes
from polyref.scoring.models import DTYPES, ModelSource, loading_errors, looks_like_path

FILE = "reward_model.json"
_FORMAT = "polyref reward model 1"
_FIX = "restore the file, or remove it to load the weights with settings of your own"


@dataclass(frozen=True, slots=True)
class RewardModelSettings:
    """How a reward model was trained, and so is read. ConfigError for a value that cannot be.

    Args:
        dtype: of the weights.
        max_length: prompt + completion are cut to so many tokens; none where nothing was cut.
        truncation_mode: which end of a sequence that is too long is kept.
        prompt_format: as_is, chat or transcript; what becomes of texts that are plain strings.
        temperature: T > 0 by which differences of reward are best divided, or none where none was fitted.
        gguf_file: the GGUF file, in the folder that the adapter names, which holds the base of the adapter.
    """

    dtype: str = "float32"
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    prompt_format: str = "as_is"
    temperature: float | None = None
    gguf_file: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}", fix=f"use one of {', '.join(DTYPES)}")
        check_truncation(self.max_length, self.truncation_mode)
        if self.prompt_format not in PROMPT_FORMATS:
            raise ConfigError(f"prompt_format is {self.prompt_format!r}", fix=f"use one of {', '.join(PROMPT_FORMATS)}")
        check_temperature(self.temperature)
        if not isinstance(self.gguf_file, str | None):
            raise ConfigError(f"gguf_file is {self.gguf_file!r}", fix="give the name of a file, or none")


def check_temperature(temperature: float | None) -> None:
    """ConfigError unless it is a finite number above 0, or none."""
    number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if temperature is not None and not (number and 0 < temperature < math.inf):
        raise ConfigError(f"temperature is {temperature!r}", fix="give a finite number above 0, or none")


def write_reward_settings(folder: str | Path, settings: RewardModelSettings) -> None:
    """Keep `settings` beside the weights in `folder`. RunFolderError where it cannot be written."""
    content = json.dumps({"format": _FORMAT} | asdict(settings), indent=2) + "\n"
    write_bytes(Path(folder) / FILE, content.encode())


def read_reward_settings(model: str | Path, revision: str | None = None) -> RewardModelSettings | None:
    """What is kept beside the weights in folder or hub id `model`, or None where nothing is.

    ModelError, in one line, for a file that is not of this form: a setting that is not known may change what a reward is.
    """
    file = _file(ModelSource(str(model), revision=revision))
    if file is None:
        return None
    where = str(Path(model) / FILE)
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot be read as JSON: {one_line(error, 200)}", where=where, fix=_FIX) from error
    names = {"format", *(field.name for field in fields(RewardModelSettings))}
    if not isinstance(found, Mapping) or found.get("format") != _FORMAT:
        raise ModelError(f"is not of the form {_FORMAT!r}", where=where, fix=_FIX)
    if odd := sorted(names ^ found.keys()):
        verb = "is missing" if odd[0] in names else "is not known"
        raise ModelError(f"the setting {odd[0]!r} {verb}", where=where, fix=_FIX)
    values: dict[str, Any] = {name: value for name, value in found.items() if name != "format"}
    try:
        return RewardModelSettings(**values)
    except (ConfigError, TypeError) as error:
        raise ModelError(getattr(error, "what", str(error)), where=where, fix=_FIX) from error


def _file(source: ModelSource) -> Path | None:
    """Where the settings of a model are, fetched from the hub if need be; a model that is nowhere has none."""
    if looks_like_path(source.model):
        path = Path(source.model).expanduser() / FILE
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    with loading_errors(source, "reward model's settings"):
        try:
            return Path(hf_hub_download(source.model, FILE, revision=source.revision))
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
            return None  # if the model itself is not there either, loading it says so
