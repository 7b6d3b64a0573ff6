"""Compile every kernel for an H200 on a machine without one, and print what the compiler says of it as JSON.

Run by test_compiling.py in a process of its own, because there the kernels must not be interpreted.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from workers.kernels.add_rows import _dot_add_rows
from workers.kernels.decoder_loops import _add_rms_norm, _rotate, _silu_mul
from workers.kernels.outputs import _sum_rows
from workers.kernels.paged_attention import _attend, _combine, _write
from workers.kernels.stacked_rows import _stacked_rows
from workers.kernels.step_tables import LONG_TILE_TOKENS, WEIGHT_TILE_TOKENS
from workers.kernels.tiles import (
    Tiles,
    dot_tiles,
    page_tiles,
    stacked_tiles,
    sum_tiles,
    token_tiles,
    weight_tiles,
)
from workers.kernels.trained_rows import (
    _stack_rows,
    _sum_pages,
    _sum_parts_of_pages,
    _sum_token_rows,
)
from workers.kernels.weight_mode import _weight_mode

HIDDEN = 6144
"""StarCoder-15B's: the shapes of the performance table."""

TYPES = {
    **dict.fromkeys(("x", "in_rows", "out_rows", "weight", "base_bias", "query", "keys"), "*bf16"),
    **dict.fromkeys(("values", "y", "output", "key", "value", "residual", "gate", "up"), "*bf16"),
    **dict.fromkeys(("cosine", "sine", "rows"), "*bf16"),
    **dict.fromkeys(("z", "dots", "part", "part_max", "part_sum"), "*fp32"),
    **dict.fromkeys(("bank", "gradient"), "*fp32"),
    **dict.fromkeys(("row_token_R", "row_page_R", "page_F", "tile_JC", "block_NB"), "*i32"),
    "tile_JS": "*i32",
    **dict.fromkeys(("place_T", "position_T", "page_R", "first_T1", "base_row_T"), "*i64"),
    **dict.fromkeys(("token_R", "row_R", "begin_P", "end_P", "first_part_N1"), "*i64"),
    **dict.fromkeys(("scale_log2", "epsilon"), "fp32"),
}
# Integers that are multiples of 16 in every real model; the compiler is told so of each launch's.
MULTIPLES = (
    "z_stride",
    "z_split_stride",
    "z_row_stride",
    "y_stride",
    "weight_stride_o",
    "in_features",
    "out_features",
    "features_per_split",
    "width",
)


def compile_kernel(
    kernel: Any, tiles: Tiles, element: str = "bf16", **constants: Any
) -> dict[str, int]:
    names = list(kernel.arg_names)
    at = {name: (names.index(name),) for name in names}
    types = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in names}
    aligned = [name for name in names if types[name].startswith("*") or name in MULTIPLES]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={at[name]: value for name, value in constants.items()},
        attrs={at[name]: [["tt.divisibility", 16]] for name in aligned if name not in constants},
    )
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    return {
        "shared_bytes": compiled.metadata.shared,
        "spilled_bytes": _spilled_bytes(ptx),
        "matrix_instructions": ptx.count("wgmma.mma_async") + ptx.count("mma.sync"),
        "warpgroup_instructions": ptx.count("wgmma.mma_async"),
        "asynchronous_copies": len(re.findall(r"cp\.async\.c[ag]", ptx)),
    }


def _spilled_bytes(ptx: str) -> int:
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        said = subprocess.run(
            [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill", said))


def kernels() -> Iterator[tuple[str, Callable[[], dict[str, int]]]]:
    for num_rows in (16, 128):
        tiles = stacked_tiles(num_rows, HIDDEN, HIDDEN, torch.bfloat16)
        yield f"stacked rows, {num_rows}", lambda tiles=tiles: compile_kernel(
            _stacked_rows, tiles, weight_stride_i=1, BLOCK_R=tiles.rows, BLOCK_O=tiles.outs,
            BLOCK_I=tiles.ins, OPERAND=tl.bfloat16,
        )  # fmt: skip
    for tokens in (1, LONG_TILE_TOKENS):
        tiles = sum_tiles(tokens, HIDDEN)
        yield f"outputs, {tokens}", lambda tiles=tiles: compile_kernel(
            _sum_rows, tiles, HAS_BIAS=True, HAS_DOTS=True, BLOCK_T=tiles.rows, BLOCK_O=tiles.outs,
            BLOCK_E=tiles.ins, OPERAND=tl.bfloat16,
        )  # fmt: skip
        tiles = dot_tiles(64, tokens, HIDDEN)
        yield f"dots, {tokens}", lambda tiles=tiles: compile_kernel(
            _dot_add_rows, tiles, BLOCK_T=tiles.rows, BLOCK_E=tiles.outs, BLOCK_I=tiles.ins,
            OPERAND=tl.bfloat16,
        )  # fmt: skip
    tiles = weight_tiles(WEIGHT_TILE_TOKENS, HIDDEN, HIDDEN, torch.bfloat16)
    yield "weight mode", lambda tiles=tiles: compile_kernel(
        _weight_mode, tiles, weight_stride_i=1, HAS_BIAS=True, HAS_DOTS=True, IS_APART=False, NUM_K=1,
        BLOCK_T=tiles.rows, BLOCK_O=tiles.outs, BLOCK_I=tiles.ins, BLOCK_K=16, OPERAND=tl.bfloat16,
    )  # fmt: skip
    wide = stacked_tiles(128, HIDDEN, HIDDEN, torch.float32)
    yield "stacked rows, float32", lambda: compile_kernel(
        _stacked_rows, wide, "fp32", weight_stride_i=1, BLOCK_R=wide.rows, BLOCK_O=wide.outs,
        BLOCK_I=wide.ins, OPERAND=tl.float32,
    )  # fmt: skip
    large = weight_tiles(WEIGHT_TILE_TOKENS, HIDDEN, HIDDEN, torch.float32)
    yield "weight mode, float32", lambda: compile_kernel(
        _weight_mode, large, "fp32", weight_stride_i=1, HAS_BIAS=True, HAS_DOTS=True,
        IS_APART=True, NUM_K=4, BLOCK_T=large.rows, BLOCK_O=large.outs, BLOCK_I=large.ins,
        BLOCK_K=16, OPERAND=tl.float32,
    )  # fmt: skip
    yield "attention, float32", lambda: compile_kernel(
        _attend, Tiles(1, 1, 1, warps=8, stages=2), "fp32", NUM_K=8, NUM_G=4, BLOCK_TOKENS=16,
        BLOCK_M=64, BLOCK_L=16, IS_SINGLE=True, OPERAND=tl.float32, HEAD_DIM=128, BLOCK_D=128,
    )  # fmt: skip
    plain = Tiles(1, 1, 1)
    heads = {"HEAD_DIM": 128, "BLOCK_D": 128}
    for tokens in (1, 16):
        yield f"attention, {tokens}", lambda tokens=tokens: compile_kernel(
            _attend, plain, NUM_K=8, NUM_G=4, BLOCK_TOKENS=16, BLOCK_M=max(16, 4 * tokens),
            BLOCK_L=64, IS_SINGLE=tokens > 1, OPERAND=tl.bfloat16, **heads,
        )  # fmt: skip
    yield (
        "combined attention",
        lambda: compile_kernel(_combine, plain, NUM_HEADS=32, BLOCK_C=16, **heads),
    )
    yield "written pages", lambda: compile_kernel(_write, plain, BLOCK_F=1024)
    yield "norm", lambda: compile_kernel(_add_rms_norm, plain, HAS_X=True, BLOCK_H=8192)
    yield "activation", lambda: compile_kernel(_silu_mul, plain, BLOCK_F=1024)
    yield "rotation", lambda: compile_kernel(_rotate, plain, BLOCK_D=64)
    tokens = token_tiles(HIDDEN)
    blocks = {"BLOCK_T": tokens.rows, "BLOCK_W": tokens.outs}
    for name, kernel in (("stacked", _stack_rows), ("summed", _sum_token_rows)):
        yield (
            f"trained rows, {name}",
            lambda kernel=kernel: compile_kernel(kernel, tokens, IS_ALL_BASE=False, **blocks),
        )
    pages = page_tiles(HIDDEN)
    yield (
        "trained pages, parts",
        lambda: compile_kernel(_sum_parts_of_pages, pages, BLOCK_R=pages.rows, BLOCK_W=pages.outs),
    )
    yield "trained pages", lambda: compile_kernel(_sum_pages, pages, BLOCK_W=pages.outs)


if __name__ == "__main__":
    json.dump({name: compiled() for name, compiled in kernels()}, sys.stdout)
