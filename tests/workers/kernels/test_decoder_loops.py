"""The decoder's small kernels against torch's own operations, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.kernels.decoder_loops import KernelDecoderLoops
from workers.models.native.decoder_loops import TorchDecoderLoops

# The interpreter rounds to bfloat16 towards zero, a GPU and torch to the nearest.
LIMIT = {torch.float32: 1e-6, torch.bfloat16: 2**-6}


def near(got: Tensor, wanted: Tensor) -> None:
    limit = LIMIT[wanted.dtype]
    torch.testing.assert_close(got.float(), wanted.float(), rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype", LIMIT)
class TestAgainstTorch:
    def wide(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Columns of a wider matrix, as the parts of a joint product are."""
        generator = torch.Generator().manual_seed(len(shape))
        return torch.randn(shape[0], 2 * shape[1], generator=generator).to(dtype)[:, : shape[1]]

    @pytest.mark.parametrize("has_x", [True, False])
    def test_the_norm_of_a_residual_that_grows(self, dtype: torch.dtype, has_x: bool) -> None:
        residual, weight = self.wide(dtype, 5, 48), torch.rand(48).to(dtype)
        x = self.wide(dtype, 5, 48) + 1 if has_x else None
        ours, theirs = residual.clone(), residual.clone()
        y = KernelDecoderLoops().add_rms_norm(ours, x, weight, 1e-5)
        near(y, TorchDecoderLoops().add_rms_norm(theirs, x, weight, 1e-5))
        near(ours, theirs)
        assert torch.equal(ours, residual) == (not has_x)

    def test_gated_activation(self, dtype: torch.dtype) -> None:
        gate, up = self.wide(dtype, 4, 1100), self.wide(dtype, 4, 1100) + 1
        near(KernelDecoderLoops().silu_mul(gate, up), TorchDecoderLoops().silu_mul(gate, up))

    def test_heads_turn_with_their_position_and_nothing_else_moves(
        self, dtype: torch.dtype
    ) -> None:
        angle_MD = torch.outer(torch.arange(9.0), torch.rand(12))
        tables = angle_MD.cos().to(dtype), angle_MD.sin().to(dtype)
        position_T = torch.tensor([0, 8, 3, 3])
        whole = torch.randn(4, 5 * 24, generator=torch.Generator().manual_seed(0)).to(dtype)
        ours, theirs = whole.clone(), whole.clone()
        KernelDecoderLoops().rotate(ours[:, 24:72], *tables, position_T)
        TorchDecoderLoops().rotate(theirs[:, 24:72], *tables, position_T)
        near(ours, theirs)
        assert torch.equal(ours[:, :24], whole[:, :24])
        assert torch.equal(ours[:, 72:], whole[:, 72:])


def test_a_step_without_tokens_launches_nothing() -> None:
    loops, weight = KernelDecoderLoops(), torch.ones(8)
    assert loops.add_rms_norm(torch.empty(0, 8), None, weight, 1e-5).shape == (0, 8)
    assert loops.silu_mul(torch.empty(0, 8), torch.empty(0, 8)).shape == (0, 8)
    loops.rotate(torch.empty(0, 8), torch.ones(2, 4), torch.ones(2, 4), torch.empty(0).long())
