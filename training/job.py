"""The entry point of a training job, wherever it runs.

    python -m training.job SPEC [--job-id ID] [--settings FILE] [--set key=value …]
    ray job submit --working-dir . -- python -m training.job examples/demo.yaml

SPEC is a path, or `store:KEY` for one in the registry's store. Exit codes: 0 every adapter is published, 1 some adapter
or the job failed, 2 the specification or the settings are wrong.
"""

from __future__ import annotations

import argparse
import logging
import re
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from storage.errors import FloraError, InvalidRequestError
from storage.stores import open_store
from training.events import (
    AdapterEvaluated,
    AdapterFailed,
    AdapterPublished,
    AdapterStarted,
    AdapterStep,
    JobFailed,
    TrainingEvent,
)
from training.job_settings import JobSettings, job_directory, read_job_settings
from training.job_store import DRIVER, JobStore
from training.spec import TrainingSpec
from training.spec_file import read_spec
from training.stored_spec import STORED, fetch_spec

if TYPE_CHECKING:
    from training.job_end import JobResult

EXIT_OK, EXIT_FAILED, EXIT_WRONG_INPUT = 0, 1, 2
LOG_EVERY_STEPS = 10

logger = logging.getLogger("flora.training")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one job on the Ray cluster of `RAY_ADDRESS`, or on one of its own; returns the exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        settings = read_job_settings(options.settings)
        job_id = options.job_id or new_job_id(options.spec)
        result = _run(options.spec, job_id, settings, dict(options.set))
    except InvalidRequestError as error:
        logger.error("%s", error.message)
        return EXIT_WRONG_INPUT
    except FloraError as error:
        logger.error("%s", error.message)
        return EXIT_FAILED
    _log_result(result)
    return EXIT_OK if result.is_success else EXIT_FAILED


def _run(spec: str, job_id: str, settings: JobSettings, overrides: dict[str, Any]) -> JobResult:
    try:
        checked = _read(spec, job_id, settings, overrides)
        # Not before: this brings torch, and what is wrong with a specification should be told at once.
        from training.ray_train import run_training

        return run_training(checked, settings, log_event, job_id=job_id)
    except InvalidRequestError as error:
        if error.param == "job_id":
            raise  # no id of a job, or that of another one, which this is no news of
        _tell_failure(settings, job_id, error.message)
        raise
    except (FloraError, OSError, MemoryError):
        raise  # nothing about the job: another attempt may do better
    except Exception as error:
        _tell_failure(settings, job_id, f"the job met an unexpected error ({type(error).__name__})")
        raise


def _tell_failure(settings: JobSettings, job_id: str, reason: str) -> None:
    """Whoever waits for the job reads its events, not its log."""
    with JobStore(open_store(settings.storage), job_id).writer(DRIVER) as tell:
        tell(JobFailed(job_id, reason))


def new_job_id(spec: str) -> str:
    """A fresh id that says what it is of and when it began."""
    stem = re.sub(r"[^a-z0-9]+", "-", Path(spec).stem.lower()).strip("-")[:24] or "job"
    return f"{stem}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


def log_event(event: TrainingEvent) -> None:
    """Events for whoever reads a job's log; the event file has all of them."""
    match event:
        case AdapterStarted():
            logger.info(
                "%s: %s of rank %d, %d sequences (%d cut, %d left out), step %d of %d",
                *(event.adapter, event.family, event.rank, event.sequences),
                *(event.truncated, event.dropped, event.step, event.steps),
            )
        case AdapterStep() if event.step % LOG_EVERY_STEPS == 0 or event.step == event.steps:
            logger.info(
                "%s: step %d of %d, loss %.4f", event.adapter, event.step, event.steps, event.loss
            )
        case AdapterEvaluated():
            logger.info("%s: held-out loss %.4f", event.adapter, event.loss)
        case AdapterPublished():
            logger.info("%s: published %s as %s", event.adapter, event.version, event.alias)
        case AdapterFailed():
            logger.error("%s: failed: %s", event.adapter, event.reason)


def _read(spec: str, job_id: str, settings: JobSettings, overrides: dict[str, Any]) -> TrainingSpec:
    path = Path(spec)
    if spec.startswith(STORED):
        directory = job_directory(settings, job_id) / "specification"
        store = open_store(settings.storage)
        path = fetch_spec(store, spec.removeprefix(STORED), directory)
    return read_spec(path, overrides, settings.storage)


def _log_result(result: JobResult) -> None:
    if result.error is not None:
        logger.error("the job failed: %s", result.error)
    count = len(result.published)
    logger.info("published %d of %d adapters", count, count + len(result.failed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.job", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("spec", help="YAML or JSON: a path, or store:KEY")
    parser.add_argument("--job-id", help="the job's name; the same again goes on where it stopped")
    parser.add_argument("--settings", type=Path, help="a settings file")
    parser.add_argument(
        "--set",
        type=_assignment,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a field of the specification (dotted: defaults.steps=20)",
    )
    return parser


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"{value!r} is not a YAML value") from None


if __name__ == "__main__":
    sys.exit(main())
