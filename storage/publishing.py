"""The one door into the registry, for a user's push and for a finished training job alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from storage.base_checkpoint import BaseFacts
from storage.config import DEFAULT_MAX_ADAPTER_BYTES
from storage.errors import AdapterRefusedError, BaseMismatchError
from storage.formats.family import PeftAdapter
from storage.formats.peft import read_peft
from storage.identity import DEFAULT_ALIAS, AdapterName, sha256_hex
from storage.manifest import FileEntry, Manifest, ManifestContent, Provenance
from storage.registry import Registry

_SIDES = {"I": "input", "O": "output"}  # by the last letter of a field of `ModuleRows`


def publish_adapter(
    registry: Registry,
    name: AdapterName,
    files: Mapping[str, bytes],
    base: BaseFacts,
    *,
    alias: str | None = DEFAULT_ALIAS,
    may_replace: bool = True,
    source: str = "push",
    max_bytes: int = DEFAULT_MAX_ADAPTER_BYTES,
    clock: Callable[[], float] = time.time,
) -> Manifest:
    """Check an adapter against the base model it is for, bind it to that base, and publish it.

    Args:
        files: `adapter_config.json` and `adapter_model.safetensors`, by name.
        may_replace: whether the alias may mean another version now.
        source: `push`, `import`, or `training:<job id>`.
        max_bytes: of all files together.
        clock: seconds since the epoch.

    Returns:
        What was published, with warnings about what could not be checked in its provenance. If the same content was
        published before, the registry keeps the provenance of then.

    Raises:
        AdapterRefusedError: what `read_peft` refuses, too many bytes, a module the base does not have, or a tensor
            that does not fit it; names the tensor, and expected against found.
        BaseMismatchError: the files say they were made for another base, and the family depends on its values.
        Whatever `Registry.publish` raises.
    """
    num_bytes = sum(len(data) for data in files.values())
    if num_bytes > max_bytes:
        raise AdapterRefusedError(
            f"the adapter has {num_bytes:,} bytes; at most {max_bytes:,} are accepted"
        )
    adapter = read_peft(files)
    _check_shapes(adapter, base)
    manifest = Manifest(
        content=_content(files, adapter, base),
        provenance=Provenance(
            created_s=clock(),
            source=source,
            base_name=base.name,
            warnings=_base_warnings(adapter, base) + _layer_warnings(base),
        ),
        pages=adapter.rows.max_pages,
    )
    registry.publish(
        name,
        files,
        manifest.content,
        provenance=manifest.provenance,
        alias=alias,
        may_replace=may_replace,
        pages=manifest.pages,
    )
    return manifest


def _check_shapes(adapter: PeftAdapter, base: BaseFacts) -> None:
    for path, module in adapter.rows.modules.items():
        names = adapter.tensor_names[path]
        if path not in base.projections:
            raise AdapterRefusedError(
                f"tensor {next(iter(names.values()))!r} is for {path!r}, which is not a linear layer of {base.name} "
                "that can be adapted (embeddings, norms and the output head cannot)"
            )
        features = dict(zip("IO", base.projections[path], strict=True))
        for field, tensor in module.tensors().items():
            side, expected = field[-1], features[field[-1]]
            if tensor.shape[-1] != expected:
                raise AdapterRefusedError(
                    f"tensor {names[field]!r} is for {tensor.shape[-1]} {_SIDES[side]} features; expected "
                    f"{expected}, those of {path} in {base.name}"
                )


def _base_warnings(adapter: PeftAdapter, base: BaseFacts) -> tuple[str, ...]:
    made_for = adapter.rows.base_digest
    depends = adapter.rows.needs_its_base
    if made_for == base.digest:
        return ()
    if made_for is None:
        return (
            f"the files do not say which base model the adapter was made for; it is bound to {base.name}",
        ) * depends
    if depends:
        raise BaseMismatchError(
            f"the adapter was made for the base model {made_for[:12]}…, and {base.name} is {base.digest[:12]}…; "
            f"{adapter.family} adapters multiply or measure the base's weights, so it would compute something else"
        )
    return (f"made for another base model ({made_for[:12]}…) than {base.name}; the shapes match",)


def _layer_warnings(base: BaseFacts) -> tuple[str, ...]:
    if base.are_layers_known:
        return ()
    return (
        f"{base.name} is of an architecture whose layers cannot be told from its files; whether it has those of the "
        "adapter shows when it is first used",
    )


def _content(files: Mapping[str, bytes], adapter: PeftAdapter, base: BaseFacts) -> ManifestContent:
    return ManifestContent(
        files={
            name: FileEntry(sha256=sha256_hex(data), num_bytes=len(data))
            for name, data in files.items()
        },
        family=adapter.family,
        ranks={path: module.num_rows for path, module in adapter.rows.modules.items()},
        dtype=adapter.dtype,
        base_digest=base.digest,
    )
