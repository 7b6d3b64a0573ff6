"""Cross-entropy at completion positions only, a thousand positions at a time.

Logits are the largest tensor of a step (16k positions of 49k words are 3.2 GB), so a chunk's logits are made, turned
into the gradient of the hidden states, and dropped within the forward; the backward only scales that gradient.
At once there are a chunk's logits, their gradient, and one float32 tensor of their size: for 49k words 200 MB each in
float32, in bfloat16 400 MB together.

Shape legend: L completion positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_POSITIONS = 1024

Head = Callable[[Tensor], Tensor]
"""The frozen output layer: hidden_LH → logits_LV, each row on its own."""


def completion_nll(hidden_LH: Tensor, target_L: Tensor, head: Head) -> Tensor:
    """nll_L in float32 (or wider), differentiable in the hidden states. A row never touches another row's numbers."""
    nll_L: Tensor = _ChunkedNll.apply(hidden_LH, target_L, head)  # type: ignore[no-untyped-call]
    return nll_L


class _ChunkedNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_LH: Tensor, target_L: Tensor, head: Head) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        nlls, gradients = [], []
        for hidden, target in zip(
            torch.split(hidden_LH, CHUNK_POSITIONS),
            torch.split(target_L, CHUNK_POSITIONS),
            strict=True,
        ):
            with torch.set_grad_enabled(wants_gradient):
                leaf = hidden.detach().requires_grad_(wants_gradient)
                logits_LV = head(leaf)
            nll, of_logits_LV = _cross_entropy(logits_LV.detach(), target)
            nlls.append(nll)
            if wants_gradient:
                gradients.append(torch.autograd.grad(logits_LV, leaf, of_logits_LV)[0])
        if wants_gradient:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(nlls)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_L: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_LH,) = ctx.saved_tensors
        return gradient_LH * grad_L[:, None].to(gradient_LH.dtype), None, None


def _cross_entropy(logits_LV: Tensor, target_L: Tensor) -> tuple[Tensor, Tensor]:
    """nll_L, and its gradient in the logits in their type; one wide tensor of the logits' size serves both."""
    wide = torch.promote_types(logits_LV.dtype, torch.float32)
    place_L1 = target_L[:, None]
    work_LV = logits_LV.to(wide, copy=True)
    work_LV -= work_LV.amax(1, keepdim=True)
    target_logit_L1 = work_LV.gather(1, place_L1)
    sum_L1 = work_LV.exp_().sum(1, keepdim=True)
    nll_L = (sum_L1.log() - target_logit_L1).squeeze(1)
    work_LV /= sum_L1
    work_LV.scatter_add_(1, place_L1, work_LV.new_full(place_L1.shape, -1.0))
    return nll_L, work_LV.to(logits_LV.dtype)
