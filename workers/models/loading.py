"""Find a foundation model's files and load them: a local directory in transformers' layout, or a hub id."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from storage.base_checkpoint import read_base_facts
from storage.errors import InvalidRequestError, StoreUnavailableError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)
class LoadedBase:
    """A foundation model, frozen and in evaluation mode. The tokenizer is read when first asked for."""

    model: PreTrainedModel
    digest: str  # of the checkpoint's tensors as stored, whatever type they were loaded in
    directory: Path

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return _read_tokenizer(self.directory)


def load_base(path_or_id: str, dtype: torch.dtype, device: torch.device) -> LoadedBase:
    """Load a causal language model.

    Raises:
        InvalidRequestError: no such directory or hub id, or it holds no causal model in safetensors files.
        StoreUnavailableError: the hub cannot be reached.
    """
    directory = find_base(path_or_id)
    digest = read_base_facts(directory, path_or_id).digest
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidRequestError(
            f"{path_or_id} does not load as a causal language model: {_first_line(error)}",
            param="engine.base",
        ) from error
    return LoadedBase(model.to(device).eval().requires_grad_(False), digest, directory)


def load_tokenizer(path_or_id: str) -> PreTrainedTokenizerBase:
    """Raises as `load_base`."""
    return _read_tokenizer(find_base(path_or_id))


def find_base(path_or_id: str) -> Path:
    """The directory a base model's files are in; a hub id is fetched first (or found in the hub's own cache).

    Raises:
        InvalidRequestError: no such directory or hub id; says what to do.
        StoreUnavailableError: the hub cannot be reached.
    """
    directory = Path(path_or_id).expanduser()
    if (directory / "config.json").is_file():
        return directory
    if directory.exists() or not _HUB_ID.fullmatch(path_or_id):
        raise InvalidRequestError(
            f"there is no model at {path_or_id}: fetch the default one with `flora base pull`, or name "
            "a directory with config.json and *.safetensors, or a hub id (owner/model)",
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


def _read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidRequestError(
            f"the model in {directory.name} has no tokenizer that loads: {_first_line(error)}",
            param="engine.base",
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
