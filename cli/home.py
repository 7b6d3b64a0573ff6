"""Where FLoRA keeps things on this machine: `$FLORA_HOME`, or `~/.flora`."""

from __future__ import annotations

import os
from pathlib import Path


def flora_home() -> Path:
    """The directory of bases, registry, caches and the state of a running cluster. It need not exist yet."""
    return Path(os.environ.get("FLORA_HOME", "~/.flora")).expanduser().absolute()


def bases_dir() -> Path:
    """Base models, one directory each, in transformers' layout."""
    return flora_home() / "bases"


def state_file() -> Path:
    """What `flora up` wrote of the cluster it started."""
    return flora_home() / "cluster.json"
