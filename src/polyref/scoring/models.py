"""Hub id, folder, GGUF file, adapter -> a causal language model, its tokenizer, and fingerprints of their weights.

Weights are read from safetensors (or GGUF) only, never from pickles; `trust_remote_code` stays off unless asked for. Every way
in which a model can be unusable ends in one `ModelError` line.
"""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyref.errors import ConfigError, ModelError, one_line

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16", "float16", "float64")
_UNUSED_SETTING = re.compile(
    r"_.*|.*_token_id|transformers_version|(torch_)?dtype|architectures|auto_map|use_cache|return_dict|output_.*|id2label|label2id"
)
_PICKLES = ("pytorch_model*.bin", "adapter_model.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model's weights come from: `model` is a hub id or a folder, `gguf_file` a file inside it."""

    model: str
    gguf_file: str | None = None
    dtype: str = "float32"
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise ModelError("the name of a model is empty", fix="give a hub id or a folder")
        if self.dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {self.dtype!r}", where=self.model, fix=f"use one of {', '.join(DTYPES)}")

    @property
    def folder(self) -> Path | None:
        """The local folder, or None for a hub id."""
        path = Path(self.model).expanduser()
        return path if path.is_dir() else None


def load_causal_lm(source: ModelSource) -> PreTrainedModel:
    """The decoder-only language model at `source`, in evaluation mode on the CPU, in the stated dtype.

    Raises ModelError for a folder that is not there, pickled weights, encoder-decoder and vision models, or a hub out of reach.
    """
    import torch
    from transformers import AutoModelForCausalLM

    check_config(load_config(source), source.model)
    options: dict[str, Any] = _options(source) | {"dtype": getattr(torch, source.dtype)}
    if source.gguf_file is None:
        options["use_safetensors"] = True
    with loading_errors(source, "model"):
        loading: Any = AutoModelForCausalLM.from_pretrained(source.model, **options, output_loading_info=True)
    model: PreTrainedModel = loading[0]
    if missing := sorted(loading[1]["missing_keys"]):
        what = f"{len(missing)} of its weights are not there, such as {missing[0]}, and would be random"
        raise ModelError(what, where=source.model, fix="give the whole model, as save_pretrained writes it")
    if source.gguf_file is not None:
        make_serialisable(model)
    return model.eval()


def load_config(source: ModelSource) -> PretrainedConfig:
    """The model's configuration, after checks on the folder that need no library."""
    from transformers import AutoConfig

    _check_source(source)
    with loading_errors(source, "model"):
        return AutoConfig.from_pretrained(source.model, **_options(source))


def check_config(config: PretrainedConfig, where: str) -> None:
    """Refuse what is not a text decoder."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError("encoder-decoder models are not supported", where=where, fix="use a decoder-only language model")
    if hasattr(config, "vision_config"):
        raise ModelError("vision-language models are not supported", where=where, fix="use a text-only language model")


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer kept with the model at `source`."""
    from transformers import AutoTokenizer

    _check_source(source)
    with loading_errors(source, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.model, **_options(source))
    return tokenizer


@contextmanager
def adapted(model: PreTrainedModel, adapter: str) -> Iterator[nn.Module]:
    """`model` with the PEFT adapter in folder or hub id `adapter` switched on, frozen; afterwards it is bit by bit what it was.

    PEFT's own `unload` is not enough: it leaves the trained copy of every module of `modules_to_save`, biases and embeddings
    that the adapter overwrote in place, and gradients off.
    """
    import torch

    check_adapter(adapter)
    overwrites = adapter_tensors(adapter)
    overwritten = [(tensor, tensor.clone()) for name, tensor in model.state_dict().items() if name in overwrites]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modules = list(model.named_modules())[1:]
    wrapped: Any = None
    try:
        wrapped = attach_adapter(model, adapter)
        yield wrapped.eval()
    finally:
        if wrapped is not None:
            wrapped.unload()
        for name, module in modules:
            if model.get_submodule(name) is not module:
                model.set_submodule(name, module)
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for tensor, before in overwritten:
                tensor.copy_(before)


def attach_adapter(model: Any, adapter: str, *, name: str = "default") -> Any:
    """`model` wrapped by the PEFT adapter in folder or hub id `adapter`; ModelError where it is not one of this model.

    A wrapped model takes further adapters, each under another `name`; the last one is switched on.
    """
    from peft import PeftModel

    with loading_errors(ModelSource(adapter), "adapter"), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if name == "default":
            wrapped: Any = PeftModel.from_pretrained(model, adapter, use_safetensors=True)
        else:
            wrapped = model
            wrapped.load_adapter(adapter, name, use_safetensors=True)
            wrapped.set_adapter(name)
    if any("missing adapter keys" in str(warning.message) for warning in told):
        what, fix = "its weights are not those of an adapter of this model", "give an adapter that was trained on this model"
        raise ModelError(what, where=adapter, fix=fix)
    refuse_prompt_learning(wrapped, adapter)
    return wrapped


def adapter_tensors(adapter: str) -> set[str]:
    """Names of the tensors of an adapter in a folder or on the hub, spelled as the model that it is for spells its own."""
    from safetensors import safe_open

    names: set[str] = set()
    source = ModelSource(adapter)
    for file in (source.folder or _hub_snapshot(source)).glob("*.safetensors"):
        with loading_errors(source, "adapter"), safe_open(file, "pt") as tensors:
            names.update(tensors.keys())
    return {name.removeprefix("base_model.model.").replace(".base_layer.", ".") for name in names}


def refuse_prompt_learning(model: Any, where: str) -> None:
    """Prompt, prefix and p-tuning add virtual tokens, which the shared-prompt layout has no place for."""
    if getattr(model, "active_peft_config", None) is not None and model.active_peft_config.is_prompt_learning:
        raise ModelError("prompt-learning adapters are not supported", where=where, fix="use LoRA or another weight adapter")


def make_serialisable(model: PreTrainedModel) -> None:
    """Drop what is left of the GGUF loader after dequantisation, so that `save_pretrained` works."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    vars(model).update(hf_quantizer=None, is_quantized=False)


def looks_like_path(name: str) -> bool:
    """True for what can only be meant as a path: it exists, or it is no `owner/name` hub id."""
    return Path(name).expanduser().exists() or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is None or name.startswith(".")


def cache_home() -> Path:
    """$POLYREF_CACHE, or ~/.cache/polyref: where log-probs and downloaded demonstration models are kept."""
    return Path(os.environ.get("POLYREF_CACHE") or Path.home() / ".cache" / "polyref")


def weights_fingerprint(source: ModelSource) -> str:
    """xxh3-128 of the model at `source` (hex): the same weights and settings give the same value under any path.

    That is its weight files and its configuration (a GGUF file holds its own), and the code that comes with it where that is
    trusted. A file in the hub's cache is already stored under its content hash, which is then used instead of reading it.
    """
    _check_source(source)
    folder = source.folder or _hub_snapshot(source)
    if source.gguf_file is not None:
        return _files_fingerprint([folder / source.gguf_file])
    code = sorted(folder.rglob("*.py")) if source.trust_remote_code else []
    return _files_fingerprint([*_weight_files(folder), *code], _settings(load_config(source)))


def adapter_fingerprint(adapter: str | None) -> str:
    """As `weights_fingerprint`, for a PEFT adapter's weights and configuration. The empty string for none."""
    if adapter is None:
        return ""
    check_adapter(adapter)
    source = ModelSource(adapter)
    folder = source.folder or _hub_snapshot(source)
    return _files_fingerprint(_weight_files(folder)) + _file_fingerprint(*_identity(folder / "adapter_config.json"))


def module_fingerprint(model: nn.Module) -> str:
    """xxh3-128 of a model in memory: its configuration, and names, dtypes, shapes and bytes of its state.

    Adapters that are off are left out.
    """
    import torch
    import xxhash

    adapters_on = not all(getattr(module, "disable_adapters", True) for module in model.modules())
    prefix = getattr(getattr(model, "base_model", None), "prefix", None)
    state = {
        name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for name, tensor in model.state_dict().items()
        if adapters_on or not (prefix and prefix in name or ".modules_to_save." in name)
    }
    digest = xxhash.xxh3_128(_settings(getattr(model, "config", None)))
    if adapters_on:
        settings = {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()}
        active = getattr(model, "active_adapters", None)
        digest.update(json.dumps([settings, active], sort_keys=True, default=_plain).encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _settings(config: Any) -> bytes:
    """What of a configuration can change a log-probability, serialised."""

    def kept(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        used = {str(key): item for key, item in value.items() if not _UNUSED_SETTING.fullmatch(str(key))}
        return {key: kept(item) for key, item in used.items()}

    return json.dumps(kept(config.to_dict()) if hasattr(config, "to_dict") else None, sort_keys=True, default=_plain).encode()


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def default_device() -> torch.device:
    """The accelerator, if there is one."""
    import torch

    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _options(source: ModelSource) -> dict[str, Any]:
    options = {"gguf_file": source.gguf_file, "revision": source.revision, "trust_remote_code": source.trust_remote_code}
    return {name: value for name, value in options.items() if value is not None}


def _check_source(source: ModelSource) -> None:
    folder = source.folder
    if folder is None and looks_like_path(source.model):
        raise ModelError("no such folder", where=source.model, fix="give a hub id or a folder with config.json and safetensors")
    if folder is not None and source.gguf_file is not None and not (folder / source.gguf_file).is_file():
        raise ModelError(f"no file {source.gguf_file} there", where=source.model, fix="name a GGUF file in that folder")
    if source.gguf_file is not None:
        return
    if _holds_adapter(source):
        this = "this folder" if folder else "this hub id"
        fix = f"merge it into its base; or, for a reference, name the base and {this} as `adapter:`"
        raise ModelError("this is an adapter, not a model", where=source.model, fix=fix)
    if folder is None:
        return
    if not (folder / "config.json").is_file():
        raise ModelError("no config.json there", where=source.model, fix="give a folder written by save_pretrained")
    _refuse_pickles(folder, source.model)


def _holds_adapter(source: ModelSource) -> bool:
    """Whether transformers would put an adapter on the model at `source`, or load the adapter's base instead of it."""
    from transformers.utils.peft_utils import find_adapter_config_file

    with loading_errors(source, "model"):
        return find_adapter_config_file(str(source.folder or source.model), revision=source.revision) is not None


def check_adapter(adapter: str) -> None:
    """Refuse a folder that holds no adapter, or a pickled one."""
    folder = Path(adapter).expanduser()
    if looks_like_path(adapter) and not (folder / "adapter_config.json").is_file():
        raise ModelError("no adapter_config.json there", where=adapter, fix="give the folder of a saved PEFT adapter")
    if folder.is_dir():
        _refuse_pickles(folder, adapter)


def _refuse_pickles(folder: Path, where: str) -> None:
    if not any(folder.glob("*.safetensors")) and any(next(folder.glob(p), None) for p in _PICKLES):
        raise ModelError(
            "its weights are pickled, and a pickle can run code",
            where=where,
            fix="convert it with save_pretrained(..., safe_serialization=True) on a machine you trust",
        )


@contextmanager
def loading_errors(source: ModelSource, what: str) -> Iterator[None]:
    """Turn the many errors of loading into one ModelError line that says what to do."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        kind = "folder" if source.folder else "hub id"
        fix = "check the folder" if source.folder else "check the name and the network, or give a local folder"
        raise ModelError(
            f"cannot load the {what} from this {kind}: {type(error).__name__}: {one_line(error, 300)}",
            where=source.model,
            fix=fix,
        ) from error


def _hub_snapshot(source: ModelSource) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [source.gguf_file] if source.gguf_file else ["*.safetensors", "adapter_config.json"]
    if source.trust_remote_code:
        patterns.append("*.py")
    with loading_errors(source, "weights"):
        return Path(snapshot_download(source.model, revision=source.revision, allow_patterns=patterns))


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError("no safetensors weights there", where=str(folder), fix="save the model with save_pretrained")
    return files


def _files_fingerprint(files: Sequence[Path], settings: bytes = b"") -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(_file_fingerprint(*_identity(file)).encode())
    digest.update(settings)
    return digest.hexdigest()


def _identity(file: Path) -> tuple[str, int, int]:
    resolved = file.resolve()
    status = os.stat(resolved)
    return str(resolved), status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=256)
def _file_fingerprint(path: str, size: int, modified: int) -> str:
    import xxhash

    name = Path(path).name
    if Path(path).parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", name):
        return name
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
