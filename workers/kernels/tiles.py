"""How large a piece of a product one program of a kernel takes. Pure; reasoned from the counts in the kernels'
docstrings, not yet measured: `python -m benchmarks.gpu --tune` measures the alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

NUM_PROCESSORS = 132
"""Of an H200 (and H100). A guide for splitting small products, not a limit."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """One program computes `rows` × `outs` outputs over a `splits`-th of the input features, `ins` at a time."""

    rows: int
    outs: int
    ins: int
    splits: int = 1
    warps: int = 4
    stages: int = 3

    def features_per_split(self, in_features: int) -> int:
        """A multiple of `ins`; all splits together cover the input features."""
        return -(-in_features // (self.splits * self.ins)) * self.ins


def stacked_tiles(num_rows: int, in_features: int, out_features: int, dtype: torch.dtype) -> Tiles:
    """For a few rows: wide enough that W0 is the most that is read, split until all processors read."""
    rows = min(128, max(16, _power_of_two(num_rows)))
    outs = 128 if out_features >= 1024 else 32
    ins = 64 if in_features >= 512 else 32
    programs = -(-num_rows // rows) * -(-out_features // outs)
    # At least eight steps of a program's loop, or filling its pipeline costs as much as the work.
    most = max(1, in_features // (8 * ins))
    splits = max(1, min(most, 8, NUM_PROCESSORS // programs))
    warps = 8 if rows * outs > 64 * 128 else 4
    return _fitted(Tiles(rows, outs, ins, splits, warps, stages=4), dtype)


def dot_tiles(num_tiles: int, tile_tokens: int, in_features: int) -> Tiles:
    """`outs` are an adapter's add rows, taken that many at a time. The splits do not depend on `tile_tokens`."""
    # Without a matrix product the compiler does not load ahead: a wide tile is what keeps enough bytes on their way.
    ins = 32 if in_features < 1024 else 256 if tile_tokens == 1 else 128
    most = max(1, in_features // 512)
    splits = max(1, min(most, 8, -(-4 * NUM_PROCESSORS // max(1, num_tiles))))
    return Tiles(tile_tokens, 16, ins, splits, warps=4, stages=4)


def sum_tiles(tile_tokens: int, out_features: int) -> Tiles:
    """No sum over input features is left here; `ins` are add rows, taken that many at a time."""
    wide = 256 if tile_tokens == 1 else 128
    return Tiles(tile_tokens, wide if out_features >= 1024 else 32, 16)


def weight_tiles(
    tile_tokens: int, in_features: int, out_features: int, dtype: torch.dtype
) -> Tiles:
    """Large, because every program makes its own tile of the delta."""
    outs = 128 if out_features >= 1024 else 32
    ins = 64 if in_features >= 512 else 32
    return _fitted(Tiles(tile_tokens, outs, ins, warps=8, stages=3), dtype)


def token_tiles(width: int) -> Tiles:
    """Of training's loops over tokens: neighbours, mostly of one run, find their common bank row in the L1 cache."""
    return Tiles(4, 256 if width >= 1024 else 64, 1)


def page_tiles(width: int) -> Tiles:
    """Of training's sums by page; `rows` of a part are loaded at a time."""
    return Tiles(16, 128 if width >= 1024 else 64, 1)


def _fitted(tiles: Tiles, dtype: torch.dtype) -> Tiles:
    """float32 takes twice the shared memory, and products without the matrix unit more registers."""
    if dtype.itemsize <= 2:
        return tiles
    return replace(tiles, outs=min(tiles.outs, 32), ins=32, warps=8, stages=2)


def attention_tile_tokens(group: int) -> int:
    """New tokens of one tile of attention: with all query heads of a key/value head, up to 64 rows."""
    return max(1, 64 // _power_of_two(group))


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
