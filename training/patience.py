"""Asking the registry's store again where giving up would cost more than waiting."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from storage.errors import StoreUnavailableError

T = TypeVar("T")

PATIENCE_S = 30.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 2.0

logger = logging.getLogger("flora.training")


def patiently(ask: Callable[[], T]) -> T:
    """What `ask` returns; while the store cannot be reached it is called again, for at most `PATIENCE_S`.

    Raises StoreUnavailableError, the last one, and whatever else `ask` raises at once.
    """
    until_s, wait_s = time.monotonic() + PATIENCE_S, _FIRST_WAIT_S
    while True:
        try:
            return ask()
        except StoreUnavailableError as error:
            if time.monotonic() + wait_s > until_s:
                raise
            logger.warning("asking the registry's store again: %s", error.message)
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
