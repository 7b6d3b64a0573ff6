"""A finished adapter goes through the same door as a user's push."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from storage.adapter_rows import AdapterRows
from storage.base_checkpoint import BaseFacts
from storage.errors import AdapterRefusedError
from storage.formats.writing import write_flora, write_ia3, write_lora
from storage.identity import AdapterName, AdapterVersion
from storage.publishing import publish_adapter
from storage.registry import Registry
from training.checkpoints import Checkpoints
from training.spec import AdapterSpec


class JobPublisher:
    """Publishing for one job: in PEFT's layout, bound to the base it was trained on.

    What an adapter is published as is written down first, so that all attempts of the job publish the same.
    """

    def __init__(
        self,
        registry: Registry,
        base: BaseFacts,
        checkpoints: Checkpoints,
        *,
        tenant: str,
        job_id: str,
        max_bytes: int,
    ) -> None:
        self._registry = registry
        self._base = base
        self._checkpoints = checkpoints
        self._tenant = tenant
        self._job_id = job_id
        self._max_bytes = max_bytes

    def __call__(self, spec: AdapterSpec, rows: AdapterRows) -> AdapterVersion:
        """A `Publish`. Raises as `publish_adapter` and `Checkpoints.keep_finished`."""
        files = peft_files(spec, replace(rows, base_digest=self._base.digest), self._base.name)
        return self._publish(spec, self._checkpoints.keep_finished(spec.name, files))

    def again(self, spec: AdapterSpec) -> AdapterVersion | None:
        """Publish what an earlier attempt wrote down; None when it did not, or it is refused.

        Raises AdapterCorruptError: what was written down cannot be read.
        """
        files = self._checkpoints.finished.get(spec.name)
        if files is None:
            return None
        try:
            return self._publish(spec, files)
        except AdapterRefusedError:
            return None

    def _publish(self, spec: AdapterSpec, files: Mapping[str, bytes]) -> AdapterVersion:
        manifest = publish_adapter(
            self._registry,
            AdapterName(self._tenant, spec.name),
            files,
            self._base,
            alias=spec.alias,
            may_replace=spec.may_replace,
            source=f"training:{self._job_id}",
            max_bytes=self._max_bytes,
        )
        return manifest.version


def peft_files(spec: AdapterSpec, rows: AdapterRows, base_name: str) -> dict[str, bytes]:
    """The files of a PEFT directory, under the adapter's own family."""
    if spec.family == "flora":
        return write_flora(rows, base_name)
    if spec.family == "ia3":
        return write_ia3(rows, base_name)
    return write_lora(rows, base_name, use_rslora=spec.family == "rslora")
