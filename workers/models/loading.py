"""Find a foundation model's files and load them.

A model is named by a local directory in transformers' layout, a GGUF file or a directory with one, an S3 prefix with
either, or a hub id.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from storage import base_download
from storage.base_checkpoint import read_base_facts
from storage.config import StorageSettings
from storage.errors import InvalidRequestError, StoreUnavailableError
from storage.gguf_file import find_gguf
from workers.config import EngineSettings

# What transformers raises for files it cannot use: missing, wrong, of an unknown kind, or in need of another package.
_NOT_LOADABLE = (OSError, ValueError, KeyError, ImportError, RuntimeError)
# A model's files are data: code among them is never run, and nobody is asked whether it should be.
_SAFELY = {"local_files_only": True, "trust_remote_code": False}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)
class LoadedBase:
    """A foundation model, frozen and in evaluation mode. The tokenizer is read when first asked for."""

    model: PreTrainedModel
    digest: str  # of the checkpoint's tensors as stored, whatever type they were loaded in
    directory: Path  # or the GGUF file

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return _read_tokenizer(self.directory)


def load_base(path_or_id: str, dtype: torch.dtype, device: torch.device) -> LoadedBase:
    """Load a causal language model.

    Raises:
        InvalidRequestError: as `find_base`, or it holds no causal model, or a quantised one, or the checkpoint lacks a
            tensor of it.
        StoreUnavailableError: as `find_base`.
    """
    directory = find_base(path_or_id)
    digest = read_base_facts(directory, path_or_id).digest
    try:
        model, found = _read_model(directory, dtype)
    except _NOT_LOADABLE as error:
        raise InvalidRequestError(
            f"{path_or_id} does not load as a causal language model: {_first_line(error)}",
            param="engine.base",
        ) from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise InvalidRequestError(
            f"the checkpoint {path_or_id} lacks the tensor {missing[0]} ({len(missing)} in all) of "
            f"{type(model).__name__}",
            param="engine.base",
        )
    return LoadedBase(model.to(device).eval().requires_grad_(False), digest, directory)


def load_tokenizer(path_or_id: str) -> PreTrainedTokenizerBase:
    """Raises as `load_base`."""
    return _read_tokenizer(find_base(path_or_id))


def load_config(path_or_id: str) -> PretrainedConfig:
    """Raises as `load_base`."""
    place, options = _source(find_base(path_or_id))
    try:
        return AutoConfig.from_pretrained(place, **_SAFELY, **options)
    except _NOT_LOADABLE as error:
        raise InvalidRequestError(
            f"{path_or_id} has no configuration that loads: {_first_line(error)}",
            param="engine.base",
        ) from error


def find_base(path_or_id: str, storage: StorageSettings | None = None) -> Path:
    """The directory a base model's files are in, or the GGUF file it is; what is not on this machine is fetched first.

    Args:
        storage: how S3 is reached and where its files are kept, for an `s3://` prefix; by default AWS's own.

    Raises:
        InvalidRequestError: no such directory, file, prefix or hub id; says what to do.
        StoreUnavailableError: S3 or the hub cannot be reached.
    """
    if path_or_id.startswith(base_download.SCHEME):
        return base_download.fetch_base(path_or_id, storage or StorageSettings())
    path = Path(path_or_id).expanduser()
    if (path / "config.json").is_file() or find_gguf(path) is not None:
        return path
    if path.exists() or not _HUB_ID.fullmatch(path_or_id):
        raise InvalidRequestError(
            f"there is no model at {path_or_id}: fetch the default one with `flora base pull`, or name "
            "a directory with config.json and *.safetensors, a .gguf file, an s3:// prefix with either, "
            "or a hub id (owner/model)",
            param="engine.base",
        )
    try:
        return Path(snapshot_download(path_or_id, allow_patterns=_WANTED_FILES))
    except RepositoryNotFoundError:
        raise InvalidRequestError(
            f"the hub has no model {path_or_id}, or it wants a login (`hf auth login`)",
            param="engine.base",
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise StoreUnavailableError(
            f"the model {path_or_id} cannot be fetched from the hub ({_first_line(error)}); "
            "a directory on this machine needs no hub: see `flora base pull`"
        ) from error


def with_local_base(settings: EngineSettings, storage: StorageSettings) -> EngineSettings:
    """The same engine, its base model on this machine. Raises as `find_base`."""
    return settings.model_copy(update={"base": str(find_base(settings.base, storage))})


def _source(path: Path) -> tuple[Path, dict[str, str]]:
    """Where `from_pretrained` is pointed, and the GGUF file it takes there, if it is one."""
    gguf = find_gguf(path)
    return (path, {}) if gguf is None else (gguf.parent, {"gguf_file": gguf.name})


def _read_model(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Any]]:
    place, options = _source(path)
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "output_loading_info": True,
        **_SAFELY,
        **options,
    }
    if not options:
        _refuse_quantised(path, AutoConfig.from_pretrained(place, **_SAFELY))
        model, found = AutoModelForCausalLM.from_pretrained(place, **arguments)
        return model, found
    if hasattr(transformers, "GgufConfig"):  # the releases before it always unpack
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    unpacked, found = AutoModelForCausalLM.from_pretrained(place, **arguments)
    # It still counts as quantised; a plain model of its values does not.
    config = unpacked.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(unpacked).from_pretrained(
        None, config=config, state_dict=unpacked.state_dict(), dtype=dtype
    )
    return plain, found


def _refuse_quantised(path: Path, config: PretrainedConfig) -> None:
    described = getattr(config, "quantization_config", None)
    if described:
        method = described.get("quant_method") if isinstance(described, dict) else described
        raise InvalidRequestError(
            f"{path.name} is quantised ({method}); of quantised models only GGUF files are read, and unpacked",
            param="engine.base",
        )


def _read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    place, options = _source(directory)
    try:
        return AutoTokenizer.from_pretrained(place, **_SAFELY, **options)
    except _NOT_LOADABLE as error:
        raise InvalidRequestError(
            f"the model in {directory.name} has no tokenizer that loads: {_first_line(error)}",
            param="engine.base",
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
