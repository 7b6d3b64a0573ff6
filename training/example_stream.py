"""An endless, shuffled stream over one adapter's examples, whose state is one number.

Each epoch is a permutation that depends on the seed and the epoch alone, so a stream can be resumed at any point and is
the same whatever else trains beside it.
"""

from __future__ import annotations

import hashlib

import torch


class ExampleStream:
    """Indices of examples; `drawn` is the cursor to save and restore."""

    def __init__(self, num_examples: int, seed: int) -> None:
        if num_examples < 1:
            raise ValueError("a stream needs examples")
        self._num_examples = num_examples
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []
        self.drawn = 0

    def draw(self, count: int) -> list[int]:
        """The next `count` indices; a batch may reach into the next epoch."""
        indices = []
        for position in range(self.drawn, self.drawn + count):
            epoch, within = divmod(position, self._num_examples)
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed(mixed_seed(self._seed, "order", epoch))
                self._order = torch.randperm(self._num_examples, generator=generator).tolist()
                self._epoch = epoch
            indices.append(self._order[within])
        self.drawn += count
        return indices


def mixed_seed(seed: int, *purpose: str | int) -> int:
    """An independent seed for each purpose of one adapter."""
    text = "\x1f".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
