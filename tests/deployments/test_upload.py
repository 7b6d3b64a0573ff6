"""Uploads have a bounded place, and whatever ends one gives it back."""

from __future__ import annotations

import pytest

from deployments.upload import Uploads
from storage.errors import OverloadedError


def test_only_so_many_uploads_lie_here_at_once() -> None:
    uploads = Uploads(max_bytes=100, at_once=2)
    with uploads.place(), uploads.place(), pytest.raises(OverloadedError), uploads.place():
        pass
    with pytest.raises(KeyError), uploads.place():
        raise KeyError
    with uploads.place(), uploads.place():
        pass
