"""What may stand behind the question mark: a filter that is not known must not be passed over."""

from __future__ import annotations

from fastapi import Request

from storage.errors import UnsupportedFieldError


def check_query(request: Request, *known: str) -> None:
    """Raises UnsupportedFieldError for a parameter that is not one of these."""
    for name in request.query_params:
        if name not in known:
            raise UnsupportedFieldError(f"there is no parameter {name[:64]!r}", param=name[:64])
