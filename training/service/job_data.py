"""A job's files, fetched and looked at: the adapter that it asks for, as a training specification has it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from storage.base_checkpoint import BaseFacts
from storage.errors import (
    AdapterCorruptError,
    InvalidRequestError,
    NotFoundError,
    SpecificationError,
)
from training.examples import read_examples
from training.initial_rows import check_targets
from training.service.files import UploadedFiles
from training.service.job import FineTuningJob
from training.spec import AdapterSpec


class BadFileError(InvalidRequestError):
    """An uploaded file cannot be trained on; `param` is the request's field that names it."""

    code = "invalid_training_file"


class JobData:
    """Every method blocks, and raises StoreUnavailableError when the store cannot be reached.

    Args:
        read_base: the facts of the base that jobs are for; slow, asked once.
    """

    def __init__(self, files: UploadedFiles, read_base: Callable[[], BaseFacts]) -> None:
        self._files = files
        self._read_base = read_base
        self._base: BaseFacts | None = None

    def check(self, job: FineTuningJob) -> None:
        """All that can be known to be wrong without a tokenizer.

        Raises:
            BadFileError: names the file and the line.
            InvalidRequestError: names the field.
        """
        with tempfile.TemporaryDirectory() as folder:
            adapter = self.adapter(job, Path(folder))
        self._base = self._base or self._read_base()
        try:
            check_targets(adapter, self._base.projections)
        except SpecificationError as error:
            raise SpecificationError(error.message, param=f"adapter.{error.param}") from None

    def adapter(self, job: FineTuningJob, folder: Path) -> AdapterSpec:
        """What a job asks for, with its data below `folder`. Raises as `check`."""
        asked = job.request
        data = self._fetched(job, asked.training_file, "training_file", folder / "training")
        held_out = None
        if asked.validation_file is not None:
            place = folder / "validation"
            held_out = self._fetched(job, asked.validation_file, "validation_file", place)
        try:
            return job.adapter_spec(str(data), None if held_out is None else str(held_out))
        except ValidationError as error:
            raise SpecificationError(error.errors()[0]["msg"], param="adapter") from None

    def _fetched(self, job: FineTuningJob, file_id: str, param: str, folder: Path) -> Path:
        folder.mkdir(parents=True)
        try:
            file = self._files.get(job.request.tenant, file_id)
            path = self._files.fetch(file, folder)
            read_examples(path)
        except (AdapterCorruptError, NotFoundError, SpecificationError) as error:
            raise BadFileError(error.message, param=param) from None
        return path
