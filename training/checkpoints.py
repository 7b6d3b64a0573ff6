"""A job's checkpoints in the registry's store, where every worker on every machine finds them; a directory or S3.

    jobs/<job>/checkpoints/commit.json                      which objects count, written by compare-and-swap
    jobs/<job>/checkpoints/<attempt>-<round>/<adapter>.pt   one adapter's state after a round
    jobs/<job>/checkpoints/finished/<adapter>.zip           files of one that was about to be published

A round counts once `commit.json` names it: a crash before that leaves the round before. An *attempt* begins whenever
workers start, after a crash or not, with a commit of its own number; a worker of an earlier attempt that is still alive
somewhere can no longer commit then, and what it writes or removes is never what a later attempt wrote.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from storage.errors import AdapterCorruptError, InvalidRequestError, OverloadedError
from storage.identity import canonical_json, sha256_hex
from storage.object_store import ObjectNotFoundError, ObjectStore, PreconditionFailedError
from training.job_store import JobStore
from training.sharing import Shares

_ROUND = re.compile(r"(?P<attempt>\d+)-(?P<round>\d+)/.+")


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """Where one adapter's state lies, and how far it has come."""

    key: str
    sha256: str
    step: int
    is_over: bool


@dataclass(frozen=True)
class Commit:
    """What counts of a job.

    Attributes:
        job_digest: of what is trained: specification, data and base.
        attempt: from 1; the one that may commit next.
        driver: from 1; the one whose workers may begin an attempt.
        round: rounds done; every worker has saved all its adapters as often.
        shares: how the last round was shared out; empty before the first.
        adapters: by name; none before the first round.
    """

    job_digest: str
    attempt: int
    driver: int = 0
    round: int = 0
    shares: Shares = ()
    adapters: Mapping[str, SavedAdapter] = field(default_factory=dict)

    def is_over(self, adapter: str) -> bool:
        """Published or failed: nothing is left to do for it."""
        return adapter in self.adapters and self.adapters[adapter].is_over


class Checkpoints:
    """The checkpoints of one job. Methods raise StoreUnavailableError.

    `take_over` is for the job's driver; `begin` and `commit` for one process of an attempt; `save` for the one that
    trains the adapter.

    Args:
        driver: whose workers these are; what its `take_over` returned.
    """

    def __init__(self, store: ObjectStore, job_id: str, driver: int = 0) -> None:
        self._store = store
        self._folder = f"{JobStore(store, job_id).folder}checkpoints/"
        self._job_id = job_id
        self._driver = driver
        self._etag: str | None = None  # of this attempt's last commit

    def read(self, job_digest: str) -> Commit | None:
        """The last commit; None when the job has not begun.

        Raises:
            InvalidRequestError: the job of this id trains something else.
            AdapterCorruptError: the commit cannot be read.
        """
        found = self._find(job_digest)
        return None if found is None else found[0]

    def take_over(self, job_digest: str) -> int:
        """Make this the job's driver: workers of an earlier one, should there be any left, begin no attempt again.

        Raises as `read`, and OverloadedError when another driver or attempt began in this moment.
        """
        found = self._find(job_digest)
        before = Commit(job_digest, attempt=0) if found is None else found[0]
        self._driver = before.driver + 1
        self._replace(found, replace(before, driver=self._driver))
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
        found = self._find(job_digest)
        before = Commit(job_digest, attempt=0) if found is None else found[0]
        if before.driver != self._driver:
            raise self._taken_over()
        commit = replace(before, attempt=before.attempt + 1)
        self._etag = self._replace(found, commit)
        self.clean(commit)
        return commit

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
        self._etag = self._swap(commit, self._etag)

    def clean(self, commit: Commit) -> None:
        """Remove what no longer counts, given that `commit` is the last one of its attempt.

        Objects of later rounds are being written, and those of later attempts are not ours to judge.
        """
        named = {saved.key for saved in commit.adapters.values()}
        for key, attempt, round_ in self._states():
            if key not in named and (attempt, round_) <= (commit.attempt, commit.round):
                self._store.delete(key)

    # Adapters that are about to be published.

    def keep_finished(self, adapter: str, files: Mapping[str, bytes]) -> Mapping[str, bytes]:
        """Write down what an adapter is to be published as, once: returns the files of whoever was first.

        Called before publishing. A later attempt, which may have trained its last steps again on other workers and
        come out another last bit, publishes the same then.
        """
        try:
            self._store.put_if_absent(self._finished_key(adapter), _zipped(files))
        except PreconditionFailedError:
            kept = self.finished(adapter)
            return files if kept is None else kept
        return files

    def finished(self, adapter: str) -> Mapping[str, bytes] | None:
        """What `keep_finished` returned. Raises AdapterCorruptError."""
        try:
            data = self._store.get(self._finished_key(adapter)).data
        except ObjectNotFoundError:
            return None
        try:
            return _unzipped(data)
        except zipfile.BadZipFile as error:
            raise AdapterCorruptError(f"{self._finished_key(adapter)}: {error}") from error

    def finished_adapters(self) -> frozenset[str]:
        """Names of those whose files are kept."""
        folder = f"{self._folder}finished/"
        keys = (info.key for info in self._store.list(folder))
        return frozenset(key.removeprefix(folder).removesuffix(".zip") for key in keys)

    def forget_finished(self) -> None:
        """To be called when the job is over: the registry has them all."""
        for adapter in self.finished_adapters():
            self._store.delete(self._finished_key(adapter))

    @property
    def _commit_key(self) -> str:
        return f"{self._folder}commit.json"

    def _finished_key(self, adapter: str) -> str:
        return f"{self._folder}finished/{adapter}.zip"

    def _find(self, job_digest: str) -> tuple[Commit, str] | None:
        try:
            stored = self._store.get(self._commit_key)
        except ObjectNotFoundError:
            return None
        try:
            commit = _parsed(stored.data)
        except (ValueError, KeyError, TypeError) as error:
            raise AdapterCorruptError(f"{self._commit_key} cannot be read: {error}") from error
        if commit.job_digest != job_digest:
            raise InvalidRequestError(
                f"the job {self._job_id!r} has begun with another specification, other data or another base; give "
                "this one an id of its own",
                param="job_id",
            )
        return commit, stored.etag

    def _replace(self, found: tuple[Commit, str] | None, commit: Commit) -> str:
        if found is not None:
            return self._swap(commit, found[1])
        try:
            return self._store.put_if_absent(self._commit_key, _written(commit))
        except PreconditionFailedError:
            raise self._taken_over() from None

    def _swap(self, commit: Commit, etag: str) -> str:
        try:
            return self._store.compare_and_swap(self._commit_key, _written(commit), etag)
        except PreconditionFailedError:
            raise self._taken_over() from None

    def _taken_over(self) -> OverloadedError:
        return OverloadedError(f"another attempt of the job {self._job_id!r} has taken over")

    def _states(self) -> Iterator[tuple[str, int, int]]:
        for info in self._store.list(self._folder):
            found = _ROUND.fullmatch(info.key.removeprefix(self._folder))
            if found is not None:
                yield info.key, int(found["attempt"]), int(found["round"])


def _written(commit: Commit) -> bytes:
    return canonical_json(
        {
            "job_digest": commit.job_digest,
            "attempt": commit.attempt,
            "driver": commit.driver,
            "round": commit.round,
            "shares": [list(share) for share in commit.shares],
            "adapters": {
                name: {
                    "key": saved.key,
                    "sha256": saved.sha256,
                    "step": saved.step,
                    "is_over": saved.is_over,
                }
                for name, saved in commit.adapters.items()
            },
        }
    )


def _parsed(data: bytes) -> Commit:
    values = json.loads(data)
    return Commit(
        job_digest=values["job_digest"],
        attempt=values["attempt"],
        driver=values["driver"],
        round=values["round"],
        shares=tuple(tuple(share) for share in values["shares"]),
        adapters={name: SavedAdapter(**saved) for name, saved in values["adapters"].items()},
    )


def _zipped(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, data in files.items():
            archive.writestr(path, data)
    return buffer.getvalue()


def _unzipped(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {path: archive.read(path) for path in archive.namelist()}
