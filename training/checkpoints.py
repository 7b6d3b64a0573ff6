"""A job's checkpoints in the registry's store, where every worker on every machine finds them; a directory or S3.

    jobs/<job>/checkpoints/commit.json                      which objects count, written by compare-and-swap
    jobs/<job>/checkpoints/<attempt>-<round>/<adapter>.pt   one adapter's state after a round
    jobs/<job>/checkpoints/finished/<adapter>.zip           see `training/finished_files.py`

A round counts once `commit.json` names it: a crash before that leaves the round before. An *attempt* begins whenever
workers start, after a crash or not, with a commit of its own number; a worker of an earlier attempt that is still alive
somewhere can no longer commit then, and what it writes or removes is never what a later attempt wrote.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from storage.errors import AdapterCorruptError, InvalidRequestError, OverloadedError
from storage.identity import sha256_hex
from storage.index import parallel
from storage.object_store import ObjectNotFoundError, ObjectStore, PreconditionFailedError
from training.commit import Commit, OtherFormatError, SavedAdapter, parsed_commit, written_commit
from training.finished_files import FinishedFiles
from training.job_store import JobStore

_TRIES = 8  # against commits that come once a round
_ROUND = re.compile(r"(?P<attempt>\d+)-(?P<round>\d+)/.+")


class Checkpoints:
    """The checkpoints of one job. Methods raise StoreUnavailableError.

    `take_over` is for the job's driver; `begin` and `commit` for one process of an attempt, `join` for all of them;
    `save` and `keep_finished` for the one that trains the adapter.

    Args:
        driver: whose workers these are; what its `take_over` returned.

    Attributes:
        finished: what adapters were about to be published as.
    """

    def __init__(self, store: ObjectStore, job_id: str, driver: int = 0) -> None:
        self._store = store
        self._folder = f"{JobStore(store, job_id).folder}checkpoints/"
        self._job_id = job_id
        self._driver = driver
        self._etag: str | None = None  # of this attempt's last commit
        self._joined: Commit | None = None
        self.finished = FinishedFiles(store, self._folder)

    def read(self, job_digest: str) -> Commit | None:
        """The last commit; None when the job has not begun.

        Raises:
            InvalidRequestError: the job of this id trains something else, or another build's format.
            AdapterCorruptError: the commit cannot be read.
        """
        found = self._find(job_digest)
        return None if found is None else found[0]

    def take_over(self, job_digest: str) -> int:
        """Make this the job's driver: workers of an earlier one, should there be any left, begin no attempt again.

        Raises as `read`, and OverloadedError when the commit is another one whenever it is to be replaced.
        """

        def succeed(before: Commit) -> Commit:
            return replace(before, driver=before.driver + 1)

        self._driver = self._change(job_digest, succeed)[0].driver
        return self._driver

    def is_taken_over(self, job_digest: str) -> bool:
        """Whether there has been another driver since."""
        found = self._find(job_digest)
        return found is not None and found[0].driver != self._driver

    def begin(self, job_digest: str) -> Commit:
        """Start an attempt; from now on no earlier one can commit. What earlier ones left uncommitted is removed.

        Raises as `read`, and OverloadedError when the job has another driver by now, or another attempt began in this
        moment.
        """
        attempts: set[int] = set()

        def succeed(before: Commit) -> Commit:
            attempts.add(before.attempt)
            if before.driver != self._driver or len(attempts) > 1:
                raise self._taken_over()
            return replace(before, attempt=before.attempt + 1)

        commit, self._etag = self._change(job_digest, succeed)
        self.clean(commit)
        return commit

    def join(self, commit: Commit) -> None:
        """Take part in the attempt that `begin`, wherever it was called, returned this for."""
        self._joined = commit

    def save(
        self, commit: Commit, adapter: str, state: Mapping[str, Any], *, step: int, is_over: bool
    ) -> SavedAdapter:
        """Write an adapter's state for the round after `commit`; nothing when that names the same state already."""
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        data = buffer.getvalue()
        digest = sha256_hex(data)
        before = commit.adapters.get(adapter)
        if before is not None and before.sha256 == digest:
            return replace(before, step=step, is_over=is_over)
        key = f"{self._folder}{commit.attempt:06}-{commit.round + 1:06}/{adapter}.pt"
        self._store.put(key, data)
        return SavedAdapter(key, digest, step, is_over)

    def load(self, saved: SavedAdapter) -> dict[str, Any]:
        """What `save` was given. Raises AdapterCorruptError: it is gone or damaged."""
        try:
            data = self._store.get(saved.key).data
        except ObjectNotFoundError:
            data = b""
        if sha256_hex(data) != saved.sha256:
            raise AdapterCorruptError(
                f"{saved.key} does not hold what the job's checkpoint says; train under another job id"
            )
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return state

    def commit(self, commit: Commit) -> None:
        """Let a round count: everything it names has been saved.

        Raises:
            OverloadedError: another attempt of this job has begun since.
        """
        if self._etag is None:
            raise ValueError("only who began an attempt commits")
        try:
            self._etag = self._store.compare_and_swap(
                self._commit_key, written_commit(commit), self._etag
            )
        except PreconditionFailedError:
            raise self._taken_over() from None

    def clean(self, commit: Commit) -> None:
        """Remove what no longer counts, given that `commit` is the last one of its attempt.

        Objects of later rounds are being written, and those of later attempts are not ours to judge.
        """
        named = {saved.key for saved in commit.adapters.values()}
        old = [
            key
            for key, attempt, round_ in self._states()
            if key not in named and (attempt, round_) <= (commit.attempt, commit.round)
        ]
        parallel(self._store.delete, old)

    def keep_finished(self, adapter: str, files: Mapping[str, bytes]) -> Mapping[str, bytes]:
        """Write down what an adapter is to be published as, once: returns the files of whoever was first.

        Called before publishing. A later attempt, which may have trained its last steps again on other workers and
        come out another last bit, publishes the same then. Whether there is one is asked after the files are written:
        one that begins later finds them, and one that began before need not have, so this worker publishes nothing.

        Raises:
            OverloadedError: another attempt of this job, or another driver, has begun since.
        """
        if self._joined is None:
            raise ValueError("only who joined an attempt publishes")
        is_first = self.finished.put_first(adapter, files)
        kept = files if is_first else self.finished.get(adapter)
        found = self._find(self._joined.job_digest)
        now = None if found is None else found[0]
        is_ours = now is not None and (now.driver, now.attempt) == (
            self._joined.driver,
            self._joined.attempt,
        )
        if is_ours and kept is not None:
            return kept
        if is_first and now is not None and now.is_over(adapter):
            self.finished.forget(adapter)  # the job may have ended, and nobody asks for them again
        raise self._taken_over()

    @property
    def _commit_key(self) -> str:
        return f"{self._folder}commit.json"

    def _find(self, job_digest: str) -> tuple[Commit, str] | None:
        try:
            stored = self._store.get(self._commit_key)
        except ObjectNotFoundError:
            return None
        try:
            commit = parsed_commit(stored.data)
        except OtherFormatError as error:
            raise InvalidRequestError(
                f"the checkpoint of the job {self._job_id!r} {error}; go on with the build that wrote it, or give this "
                "job an id of its own",
                param="job_id",
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdapterCorruptError(f"{self._commit_key} cannot be read: {error!r}") from error
        if commit.job_digest != job_digest:
            raise InvalidRequestError(
                f"the job {self._job_id!r} has begun with another specification, other data or another base; give "
                "this one an id of its own",
                param="job_id",
            )
        return commit, stored.etag

    def _change(self, job_digest: str, succeed: Callable[[Commit], Commit]) -> tuple[Commit, str]:
        """Put what `succeed` makes of the last commit in its place; a worker may commit a round at the same moment."""
        for _ in range(_TRIES):
            found = self._find(job_digest)
            commit = succeed(Commit(job_digest, attempt=0) if found is None else found[0])
            data = written_commit(commit)
            try:
                if found is None:
                    return commit, self._store.put_if_absent(self._commit_key, data)
                return commit, self._store.compare_and_swap(self._commit_key, data, found[1])
            except PreconditionFailedError:
                continue
        raise self._taken_over()

    def _taken_over(self) -> OverloadedError:
        return OverloadedError(f"another attempt of the job {self._job_id!r} has taken over")

    def _states(self) -> Iterator[tuple[str, int, int]]:
        for info in self._store.list(self._folder):
            found = _ROUND.fullmatch(info.key.removeprefix(self._folder))
            if found is not None:
                yield info.key, int(found["attempt"]), int(found["round"])
