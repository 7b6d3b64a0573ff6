"""A job's files, fetched and looked at: the adapter that it asks for, as a training specification has it."""

from __future__ import annotations

import tempfile
from collections import OrderedDict
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
from training.examples import each_example
from training.initial_rows import check_targets
from training.service.files import UploadedFile, UploadedFiles
from training.service.job import FineTuningJob
from training.spec import AdapterSpec

_REMEMBERED = 1024  # files
_MAX_LINE_BYTES = 1 << 20


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
        self._faults: OrderedDict[tuple[str, str], str] = OrderedDict()

    def check(self, job: FineTuningJob) -> None:
        """All that can be known to be wrong without a tokenizer.

        Raises:
            BadFileError: names the file and the line.
            InvalidRequestError: names the field.
        """
        asked = job.request
        self._checked(job, asked.training_file, "training_file")
        if asked.validation_file is not None:
            self._checked(job, asked.validation_file, "validation_file")
        adapter = _spec(job, "training", None if asked.validation_file is None else "validation")
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
        return _spec(job, str(data), None if held_out is None else str(held_out))

    def _fetched(self, job: FineTuningJob, file_id: str, param: str, folder: Path) -> Path:
        file = self._checked(job, file_id, param)
        folder.mkdir(parents=True)
        try:
            return self._files.fetch(file, folder)
        except (AdapterCorruptError, NotFoundError) as error:
            raise BadFileError(error.message, param=param) from None

    def _checked(self, job: FineTuningJob, file_id: str, param: str) -> UploadedFile:
        """A file that is there and has examples in it; its id is of its content, which is read once."""
        place = (job.request.tenant, file_id)
        try:
            file = self._files.get(*place)
            if place not in self._faults:
                self._remember(place, self._fault_of(file))
        except (AdapterCorruptError, NotFoundError) as error:
            raise BadFileError(error.message, param=param) from None
        if self._faults[place]:
            raise BadFileError(self._faults[place], param=param)
        return file

    def _fault_of(self, file: UploadedFile) -> str:
        """What is wrong with its lines; empty when nothing is."""
        with tempfile.TemporaryDirectory() as folder:
            path = self._files.fetch(file, Path(folder))
            try:
                for _ in each_example(path, _MAX_LINE_BYTES):
                    pass
            except SpecificationError as error:
                return error.message
        return ""

    def _remember(self, place: tuple[str, str], fault: str) -> None:
        self._faults[place] = fault
        if len(self._faults) > _REMEMBERED:
            self._faults.popitem(last=False)


def _spec(job: FineTuningJob, data: str, held_out: str | None) -> AdapterSpec:
    try:
        return job.adapter_spec(data, held_out)
    except ValidationError as error:
        raise SpecificationError(error.errors()[0]["msg"], param="adapter") from None
