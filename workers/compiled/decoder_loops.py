"""What a decoder of the Llama shape does between its matrix products, as compiled loops.

Shape legend: T tokens, H hidden features, F features of the feed-forward part, X features of all heads of a token,
D head dimension, M positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.compiled.library import CompiledLoops


class CompiledDecoderLoops:
    """A `DecoderLoops` for float32 or bfloat16 on CPU."""

    def __init__(self, loops: CompiledLoops, dtype: torch.dtype) -> None:
        self._add_rms_norm = loops.function("add_rms_norm", dtype)
        self._silu_mul = loops.function("silu_mul", dtype)
        self._rotate = loops.function("rotate", dtype)

    def add_rms_norm(
        self, residual_TH: Tensor, x_TH: Tensor | None, weight_H: Tensor, epsilon: float
    ) -> Tensor:
        y_TH = torch.empty_like(residual_TH)
        self._add_rms_norm(
            *(residual_TH.data_ptr(), None if x_TH is None else x_TH.data_ptr()),
            *(weight_H.data_ptr(), epsilon, residual_TH.numel() // weight_H.shape[0]),
            *(weight_H.shape[0], y_TH.data_ptr()),
        )
        return y_TH

    def silu_mul(self, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        num_tokens, features = gate_TF.shape
        y_TF = gate_TF.new_empty(num_tokens, features)
        self._silu_mul(
            *(gate_TF.data_ptr(), up_TF.data_ptr(), gate_TF.stride(0)),
            *(num_tokens, features, y_TF.data_ptr()),
        )
        return y_TF

    def rotate(self, x_TX: Tensor, cosine_MD: Tensor, sine_MD: Tensor, position_T: Tensor) -> None:
        size = 2 * cosine_MD.shape[1]
        self._rotate(
            *(x_TX.data_ptr(), x_TX.stride(0), x_TX.shape[1] // size, size),
            *(cosine_MD.data_ptr(), sine_MD.data_ptr(), position_T.data_ptr(), x_TX.shape[0]),
        )


class SlabLoops:
    """Keys and values in slabs [S, K, M, D] on CPU: writing new ones, and attention of decoding sequences.

    Shape legend: T tokens, H query heads, K key/value heads, S slots, N decoding sequences.
    """

    def __init__(self, loops: CompiledLoops, dtype: torch.dtype) -> None:
        self._keep = loops.function("keep", dtype)
        self._attend = loops.function("attend", dtype)

    @staticmethod
    def is_supported(head_dim: int) -> bool:
        return head_dim % 32 == 0

    def keep(
        self,
        key_TKD: Tensor,
        value_TKD: Tensor,
        slot_T: Tensor,
        position_T: Tensor,
        keys_SKMD: Tensor,
        values_SKMD: Tensor,
    ) -> None:
        """Write every token's key and value to its place."""
        if not key_TKD.dtype == value_TKD.dtype == keys_SKMD.dtype:
            raise TypeError(f"keys and values of {key_TKD.dtype} for a cache of {keys_SKMD.dtype}")
        key_TKD, value_TKD = _token_major(key_TKD), _token_major(value_TKD)
        num_tokens, kv_heads, size = key_TKD.shape
        self._keep(
            *(key_TKD.data_ptr(), key_TKD.stride(0), value_TKD.data_ptr(), value_TKD.stride(0)),
            *(kv_heads, size, slot_T.data_ptr(), position_T.data_ptr(), num_tokens),
            *(keys_SKMD.data_ptr(), values_SKMD.data_ptr(), keys_SKMD.shape[2]),
        )

    def attend(
        self,
        query_THD: Tensor,
        token_N: Tensor,
        slot_N: Tensor,
        length_N: Tensor,
        keys_SKMD: Tensor,
        values_SKMD: Tensor,
        scale: float,
        output_THD: Tensor,
    ) -> None:
        """Write the output of the tokens named; each sees the first `length` tokens of its slot."""
        query_THD = _token_major(query_THD)
        _, heads, size = query_THD.shape
        self._attend(
            *(query_THD.data_ptr(), query_THD.stride(0)),
            *(token_N.data_ptr(), slot_N.data_ptr(), length_N.data_ptr(), token_N.shape[0]),
            *(heads, keys_SKMD.shape[1], size, keys_SKMD.data_ptr(), values_SKMD.data_ptr()),
            *(keys_SKMD.shape[2], scale, output_THD.data_ptr(), output_THD.stride(0)),
        )


def _token_major(x_THD: Tensor) -> Tensor:
    """With a token's heads next to one another, which a transposed view need not have."""
    size = x_THD.shape[2]
    return x_THD if x_THD.stride()[1:] == (size, 1) else x_THD.contiguous()
