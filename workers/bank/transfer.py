"""The way of rows from the host to the device, beside the steps that compute there.

On a GPU copies leave pinned memory on a stream of their own. Rows are pinned when they are copied, not while they are
kept: that would save no step anything, and page-locked memory is the whole machine's. Nobody waits on the host: the
copies of a load wait, on the device, for the steps begun before it (which may still read the pages it overwrites), and
the first step that uses what was loaded waits, on the device, for the copies. On a CPU a copy is a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class RowTransfer:
    """One per bank. Any thread may copy; one thread at a time steps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            # What this thread computed so far, a bank's zeros among it, is not written over what will be copied.
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._steps: torch.cuda.Stream | None = None  # where steps were last seen to compute

    @contextmanager
    def copying(self) -> Iterator[None]:
        """What this thread copies or writes inside, it does beside the steps."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            if self._steps is not None:
                self._stream.wait_stream(self._steps)
            yield

    def to_device(self, host: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The same values on the device, once the copies are done."""
        typed = host.to(dtype=dtype or host.dtype)
        if self._stream is None or typed.is_cuda:
            return typed.to(self._device)
        return typed.pin_memory().to(self._device, non_blocking=True)

    def mark(self) -> torch.cuda.Event | None:
        """The moment, on the device, at which all copies so far are done."""
        return None if self._stream is None else self._stream.record_event()

    def join(self, copied: torch.cuda.Event | None, tensors: Iterable[Tensor]) -> None:
        """Have what this thread computes from now on wait for `copied`, and keep `tensors` until it is computed."""
        if copied is None:
            return
        self._steps = torch.cuda.current_stream(self._device)
        self._steps.wait_event(copied)
        for tensor in tensors:
            tensor.record_stream(self._steps)
