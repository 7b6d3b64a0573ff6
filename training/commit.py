"""What counts of a job's checkpoints: one object, which names the states of its adapters. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

from storage.identity import canonical_json
from training.sharing import Shares

FORMAT = 1
"""Of commits and of the states they name. Builds that wrote no number wrote this one."""


class OtherFormatError(Exception):
    """Another build wrote it. Says so as the end of a sentence about it."""


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


def written_commit(commit: Commit) -> bytes:
    return canonical_json(
        {
            "format": FORMAT,
            "job_digest": commit.job_digest,
            "attempt": commit.attempt,
            "driver": commit.driver,
            "round": commit.round,
            "shares": [list(share) for share in commit.shares],
            "adapters": {name: asdict(saved) for name, saved in commit.adapters.items()},
        }
    )


def parsed_commit(data: bytes) -> Commit:
    """What `written_commit` made.

    Raises:
        OtherFormatError: its number is another one, or it lacks what this format has.
        ValueError, TypeError, AttributeError, KeyError: it is no commit.
    """
    values = json.loads(data)
    if values.get("format", FORMAT) != FORMAT:
        raise OtherFormatError(f"is of format {values['format']}, and this build reads {FORMAT}")
    missing = [one.name for one in fields(Commit) if one.name not in values]
    if missing and "job_digest" in values:
        raise OtherFormatError(f"is of an older build: it lacks {', '.join(missing)}")
    return Commit(
        job_digest=values["job_digest"],
        attempt=values["attempt"],
        driver=values["driver"],
        round=values["round"],
        shares=tuple(tuple(share) for share in values["shares"]),
        adapters={name: SavedAdapter(**saved) for name, saved in values["adapters"].items()},
    )
