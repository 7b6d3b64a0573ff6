"""The decoder itself: attention and feed-forward blocks over adapted projections, with a residual between.

Takes weights and projections from a transformers model that has been wrapped; copies nothing but what is packed.

Shape legend: T tokens, H hidden features, D half a head's dimension, M positions, L positions whose logits are wanted,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from storage.errors import InvalidRequestError
from workers.attention.backend import AttentionBackend
from workers.models.native.decoder_loops import DecoderLoops
from workers.row_form.base_linear import BaseLinear
from workers.row_form.joint_linear import Epilogue, JointLinear

SUPPORTED = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""transformers' model types that are of this shape."""


def why_not_native(model: PreTrainedModel) -> str | None:
    """What this decoder lacks for the model; None when it has everything."""
    config = model.config
    if config.model_type not in SUPPORTED:
        return f"models of type {config.model_type} (it has {', '.join(sorted(SUPPORTED))})"
    if config.hidden_act != "silu":
        return f"the activation {config.hidden_act}"
    return None


class _Layer:
    """One block's parts."""

    def __init__(
        self,
        block: Any,
        make_linear: Callable[[Tensor, Tensor | None], BaseLinear],
        epilogue: Epilogue | None,
    ) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.attention_norm: Tensor = block.input_layernorm.weight
        self.mlp_norm: Tensor = block.post_attention_layernorm.weight
        self.epsilon: float = block.input_layernorm.variance_epsilon
        self.query_key_value = JointLinear(
            [attention.q_proj, attention.k_proj, attention.v_proj], make_linear, epilogue
        )
        query_norm = getattr(attention, "q_norm", None)
        self.head_norms: tuple[Tensor, Tensor] | None = (
            None if query_norm is None else (query_norm.weight, attention.k_norm.weight)
        )
        self.scaling: float = attention.scaling
        self.output = attention.o_proj
        self.gate, self.up, self.down = mlp.gate_proj, mlp.up_proj, mlp.down_proj


class NativeDecoder:
    """See the module's docstring.

    Args:
        model: its projections are adapted layers already.
        max_tokens: positions the rotary tables are made for.

    Raises:
        InvalidRequestError: the model is not of this shape; says what is lacking.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        loops: DecoderLoops,
        *,
        max_tokens: int,
        head_dim: int,
        make_linear: Callable[[Tensor, Tensor | None], BaseLinear],
        epilogue: Epilogue | None,
    ) -> None:
        lacking = why_not_native(model)
        if lacking is not None:
            raise InvalidRequestError(
                f"the native runner lacks {lacking}; set runner to hf", param="engine.runner"
            )
        self._loops = loops
        self._head_dim = head_dim
        inner: Any = model.model
        self._embedding_VH: Tensor = inner.embed_tokens.weight
        self._layers = [_Layer(block, make_linear, epilogue) for block in inner.layers]
        self._norm: Tensor = inner.norm.weight
        head: Any = model.get_output_embeddings()
        self._head = make_linear(head.weight, head.bias)
        positions = torch.arange(max_tokens, device=model.device)[None]
        with torch.inference_mode():
            cosine, sine = inner.rotary_emb(self._embedding_VH[:1, :1], positions)
        # The second half of a head turns with the first.
        self._cosine_MD = cosine[0, :, : head_dim // 2].contiguous()
        self._sine_MD = sine[0, :, : head_dim // 2].contiguous()

    def logits(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        attention: AttentionBackend,
        wanted_L: Tensor,
    ) -> Tensor:
        """logits_LV of the tokens wanted, in the model's type."""
        loops = self._loops
        residual_TH = self._embedding_VH.index_select(0, token_ids_T)
        x_TH: Tensor | None = None
        for number, layer in enumerate(self._layers):
            h_TH = loops.add_rms_norm(residual_TH, x_TH, layer.attention_norm, layer.epsilon)
            mixed_TX = self._attend(number, layer, h_TH, positions_T, attention)
            h_TH = loops.add_rms_norm(
                residual_TH, layer.output(mixed_TX), layer.mlp_norm, layer.epsilon
            )
            x_TH = layer.down(loops.silu_mul(layer.gate(h_TH), layer.up(h_TH)))
        residual_LH = residual_TH.index_select(0, wanted_L)
        x_LH = None if x_TH is None else x_TH.index_select(0, wanted_L)
        h_LH = loops.add_rms_norm(residual_LH, x_LH, self._norm, self._layers[0].epsilon)
        logits_LV = self._head.matmul(h_LH)
        return logits_LV if self._head.bias_O is None else logits_LV + self._head.bias_O

    def _attend(
        self,
        number: int,
        layer: _Layer,
        h_TH: Tensor,
        positions_T: Tensor,
        attention: AttentionBackend,
    ) -> Tensor:
        query, key, value = layer.query_key_value(h_TH)
        if layer.head_norms is not None:
            query, key = (
                self._loops.add_rms_norm(
                    x.reshape(-1, self._head_dim), None, weight, layer.epsilon
                ).view(x.shape)
                for x, weight in zip((query, key), layer.head_norms, strict=True)
            )
        self._loops.rotate(query, self._cosine_MD, self._sine_MD, positions_T)
        self._loops.rotate(key, self._cosine_MD, self._sine_MD, positions_T)
        query, key, value = (x.view(x.shape[0], -1, self._head_dim) for x in (query, key, value))
        mixed_THD = attention.attend(number, query, key, value, layer.scaling)
        return mixed_THD.flatten(1)
