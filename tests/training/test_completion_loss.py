"""The chunked loss against torch's own, whole."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from training import completion_loss
from training.completion_loss import completion_nll


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 21])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunks_change_neither_the_loss_nor_its_gradient(
    count: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Around every boundary between chunks of eight, beside all positions at once."""
    torch.manual_seed(count)
    head = torch.nn.Linear(12, 50, bias=False, dtype=dtype).requires_grad_(False)
    hidden, target = 3 * torch.randn(count, 12, dtype=dtype), torch.randint(0, 50, (count,))
    pull = torch.randn(count, dtype=torch.float64)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        leaf = hidden.clone().requires_grad_()
        nll = completion_nll(leaf, target, head)
        (nll * pull.to(nll.dtype)).sum().backward()
        assert leaf.grad is not None
        return nll.detach(), leaf.grad

    whole, whole_gradient = both()
    monkeypatch.setattr(completion_loss, "CHUNK_POSITIONS", 8)
    found, gradient = both()
    # A product of fewer rows may be summed in another order.
    close = {"rtol": 0.0, "atol": 2e-2 if dtype == torch.bfloat16 else 1e-5}
    torch.testing.assert_close(found, whole, **close)
    torch.testing.assert_close(gradient, whole_gradient, **close)

    leaf = hidden.double().requires_grad_()
    expected = functional.cross_entropy(
        functional.linear(leaf, head.weight.double()), target, reduction="none"
    )
    (expected * pull).sum().backward()
    assert leaf.grad is not None
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    assert float((found - expected).abs().max()) <= bound * float(expected.abs().max())
    assert float((gradient - leaf.grad).abs().max()) <= bound * float(leaf.grad.abs().max())


def test_a_position_that_is_not_finite_stays_alone() -> None:
    head = torch.nn.Linear(4, 9, bias=False).requires_grad_(False)
    hidden = torch.randn(3, 4)
    hidden[1] = torch.nan
    leaf = hidden.requires_grad_()
    nll = completion_nll(leaf, torch.tensor([1, 2, 3]), head)
    nll[[0, 2]].sum().backward()
    assert leaf.grad is not None
    assert nll[[0, 2]].isfinite().all() and nll[1].isnan()
    assert leaf.grad[[0, 2]].isfinite().all()
