"""Reads a PEFT adapter directory into rows. What it cannot read exactly it refuses by name; it ignores no tensor.

A family is one file with a reader; to add one, write it and list it here. Layouts are those that PEFT 0.21 writes.
"""

from __future__ import annotations

from collections.abc import Mapping

from storage.adapter_rows import AdapterRows
from storage.errors import AdapterRefusedError
from storage.formats import flora, hira, ia3, lora
from storage.formats.family import AdapterFile, PeftAdapter
from storage.formats.peft_settings import check_known, parse_settings
from storage.formats.tensors import read_tensors

SETTINGS_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"

READERS = {reader.peft_type: reader for reader in (hira.READER, ia3.READER, lora.READER)}


def read_peft(files: Mapping[str, bytes]) -> PeftAdapter:
    """The rows of an adapter directory. Needs no base model.

    Args:
        files: `adapter_config.json` and `adapter_model.safetensors`, by name.

    Raises:
        AdapterRefusedError: a file, setting or tensor that is missing, unknown, not supported or contradictory;
            names it.
    """
    _check_file_names(files)
    settings = parse_settings(files[SETTINGS_FILE])
    peft_type = settings.get("peft_type")
    reader = READERS.get(peft_type) if isinstance(peft_type, str) else None
    if reader is None:
        raise AdapterRefusedError(
            f"adapter_config.json has peft_type {peft_type!r}; supported are {', '.join(READERS)}"
        )
    check_known(reader.peft_type, settings, reader.settings)
    tensors, metadata = read_tensors(TENSORS_FILE, files[TENSORS_FILE])
    family, modules = reader.read(AdapterFile(settings, tensors, metadata))
    return PeftAdapter(
        AdapterRows(
            {path: module.rows for path, module in modules.items()}, metadata.get(flora.BASE_DIGEST)
        ),
        family,
        {path: module.names for path, module in modules.items()},
        ",".join(sorted({str(one.dtype).removeprefix("torch.") for one in tensors.values()})),
    )


def _check_file_names(files: Mapping[str, bytes]) -> None:
    for name in (SETTINGS_FILE, TENSORS_FILE):
        if name not in files:
            raise AdapterRefusedError(
                f"the file {name} is missing; an adapter is {SETTINGS_FILE} and {TENSORS_FILE} "
                "(pickled weights are never read)"
            )
    if unexpected := sorted(set(files) - {SETTINGS_FILE, TENSORS_FILE}):
        raise AdapterRefusedError(f"unexpected file {unexpected[0]!r} in the adapter")
