"""Compiled steps of a decoder against torch's, in both types they are compiled for."""

from __future__ import annotations

import pytest
import torch

from tests.workers.compiled.compiler import library
from workers.compiled.decoder_loops import CompiledDecoderLoops
from workers.engine.sampling.greedy import choose_greatest, torch_greatest
from workers.models.native.decoder_loops import TorchDecoderLoops

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: (1e-5, 1e-6), torch.bfloat16: (2**-7, 2**-9)}  # relative, absolute


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    relative, absolute = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours, theirs, rtol=relative, atol=absolute)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_x", [True, False])
@pytest.mark.parametrize(("tokens", "features"), [(1, 5), (3, 64), (40, 100)])
def test_add_rms_norm(tokens: int, features: int, with_x: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    residual, x = torch.randn(2, tokens, features).to(dtype)
    weight = torch.randn(features).to(dtype)
    ours, theirs = residual.clone(), residual.clone()
    added = x if with_x else None
    y = CompiledDecoderLoops(library(), dtype).add_rms_norm(ours, added, weight, 1e-5)
    close(y, TorchDecoderLoops().add_rms_norm(theirs, added, weight, 1e-5))
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, residual) is not with_x


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_of_two_halves_of_one_product(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    both = (torch.randn(9, 2 * 37) * 8).to(dtype)
    both[0, :4] = torch.tensor([0.0, 90.0, -90.0, -1e30])
    gate, up = both.chunk(2, dim=1)
    close(
        CompiledDecoderLoops(library(), dtype).silu_mul(gate, up),
        TorchDecoderLoops().silu_mul(gate, up),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_of_a_part_of_a_product(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    angle = torch.arange(50)[:, None] / torch.tensor([1.0, 10.0, 100.0, 1000.0])
    cosine, sine = angle.cos().to(dtype), angle.sin().to(dtype)
    position = torch.tensor([0, 49, 7, 7, 30])
    whole = torch.randn(5, 40).to(dtype)
    ours, theirs = whole.clone(), whole.float()
    CompiledDecoderLoops(library(), dtype).rotate(ours[:, 8:32], cosine, sine, position)
    # In float32, for torch would round every product on its own.
    TorchDecoderLoops().rotate(theirs[:, 8:32], cosine.float(), sine.float(), position)
    close(ours, theirs.to(dtype))
    assert torch.equal(ours[:, :8], whole[:, :8])
    assert torch.equal(ours[:, 32:], whole[:, 32:])
    assert not torch.equal(ours[1:, 8:32], whole[1:, 8:32])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_is_never_lost(dtype: torch.dtype) -> None:
    loops = CompiledDecoderLoops(library(), dtype)
    x = torch.ones(2, 64, dtype=dtype)
    x[0, 3] = torch.nan
    weight = torch.ones(64, dtype=dtype)
    assert loops.silu_mul(x, torch.ones_like(x)).isnan().any(1).tolist() == [True, False]
    normed = loops.add_rms_norm(torch.zeros_like(x), x, weight, 1e-5)
    assert normed.isnan().all(1).tolist() == [True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 1000, 4096, 5001])
def test_the_greatest_of_each_row(columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(columns)
    rows = torch.randn(12, columns).to(dtype)
    rows[1] = 0.0  # the first of equals
    rows[2, columns // 2] = rows[3, -1] = 50.0
    rows[4, columns // 3] = torch.nan
    rows[5, 0], rows[6, -1] = torch.inf, -torch.inf
    ours = choose_greatest(rows.device, compiled=True)(rows)
    assert torch.equal(ours, torch_greatest(rows))
    assert (ours == -1).nonzero().flatten().tolist() == [4, 5, 6]
