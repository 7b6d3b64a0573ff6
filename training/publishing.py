"""A finished adapter goes through the same door as a user's push."""

from __future__ import annotations

from dataclasses import replace

from storage.adapter_rows import AdapterRows
from storage.base_checkpoint import BaseFacts
from storage.formats.writing import write_flora, write_ia3, write_lora
from storage.identity import AdapterName, AdapterVersion
from storage.publishing import publish_adapter
from storage.registry import Registry
from training.spec import AdapterSpec
from training.trainer import Publish


def publisher(
    registry: Registry, base: BaseFacts, *, tenant: str, job_id: str, max_bytes: int
) -> Publish:
    """Publishing for one job: in PEFT's layout, bound to the base it was trained on. Raises as `publish_adapter`."""

    def publish(spec: AdapterSpec, rows: AdapterRows) -> AdapterVersion:
        bound = replace(rows, base_digest=base.digest)
        manifest = publish_adapter(
            registry,
            AdapterName(tenant, spec.name),
            peft_files(spec, bound, base.name),
            base,
            alias=spec.alias,
            source=f"training:{job_id}",
            max_bytes=max_bytes,
        )
        return manifest.version

    return publish


def peft_files(spec: AdapterSpec, rows: AdapterRows, base_name: str) -> dict[str, bytes]:
    """The files of a PEFT directory, under the adapter's own family."""
    if spec.family == "flora":
        return write_flora(rows, base_name)
    if spec.family == "ia3":
        return write_ia3(rows, base_name)
    return write_lora(rows, base_name, use_rslora=spec.family == "rslora")
