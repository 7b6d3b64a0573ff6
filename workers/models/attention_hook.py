"""How a transformers model is made to use an attention back end of ours, its own files unedited.

The model is switched to an attention implementation that is registered here and handed the back end of the forward as
a keyword argument, which transformers passes down to every layer. No mask function is registered under that name, so
the model builds no mask. What a model asks for and back ends lack is refused by name when it is adopted, never ignored.

Shape legend: T tokens in the step, H query heads, K key/value heads, D head dimension.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from storage.errors import InvalidRequestError
from workers.models.wrapping import linear_layers

IMPLEMENTATION = "flora"
BACKEND_ARGUMENT = "flora_attention"

# What models are known to hand to their attention function, and what it would mean to leave it out.
_LACKING: Mapping[str, str] = {
    "softcap": "soft-capped attention scores",
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
}
# Rotary scalings whose frequencies change for a whole batch once its longest sequence outgrows the trained length.
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
_PROBE_TOKENS = 3


class Attend(Protocol):
    """The part of `AttentionBackend` a layer uses."""

    def attend(
        self, layer: int, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scale: float
    ) -> Tensor: ...


class AttentionProbe:
    """Stands in for a back end once, to see what every layer asks for; each token attends to itself only."""

    def __init__(self, max_tokens: int) -> None:
        self.kv_shapes: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self._max_tokens = max_tokens

    def check(
        self, module: nn.Module, is_self_attention: bool, arguments: Mapping[str, Any]
    ) -> None:
        """Raises InvalidRequestError for an argument that asks for more than plain causal self-attention."""
        for name, what in _LACKING.items():
            if arguments.get(name) is not None:
                raise _refusal(module, what)
        is_causal = arguments.get("is_causal")
        if not is_self_attention or not (
            getattr(module, "is_causal", True) if is_causal is None else is_causal
        ):
            raise _refusal(module, "attention that is not causal self-attention")
        window = arguments.get("sliding_window")
        if window is not None and window < self._max_tokens:
            raise _refusal(module, _window(f"a sliding window of {window} tokens", window))

    def attend(
        self, layer: int, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scale: float
    ) -> Tensor:
        self.kv_shapes[layer] = (tuple(key_TKD.shape[1:]), tuple(value_TKD.shape[1:]))
        return value_TKD.repeat_interleave(query_THD.shape[1] // value_TKD.shape[1], dim=1)


def adopt_attention(model: PreTrainedModel, max_tokens: int) -> tuple[int, int]:
    """Switch a model to back ends of ours, and check that it needs nothing they lack, nor adapted layers.

    Args:
        model: changed in place; from now on every forward needs `BACKEND_ARGUMENT`.
        max_tokens: the longest sequence it will see; a window at least this wide never cuts anything off.

    Returns:
        The number of key/value heads and the head dimension, the same in all layers.

    Raises:
        InvalidRequestError: names what the model needs.
    """
    config = model.config.get_text_config(decoder=True)
    _refuse_by_config(model, config, max_tokens)
    model.set_attn_implementation(IMPLEMENTATION)
    probe = AttentionProbe(max_tokens)
    positions_1T = torch.arange(_PROBE_TOKENS, device=model.device)[None]
    with torch.inference_mode(), _every_linear_sees_every_token(model):
        model(
            input_ids=torch.zeros_like(positions_1T),
            position_ids=positions_1T,
            use_cache=False,
            **{BACKEND_ARGUMENT: probe},
        )
    if sorted(probe.kv_shapes) != list(range(config.num_hidden_layers)):
        raise _refusal(model, "layers that are not self-attention (recurrent or linear ones)")
    shapes = {shape for pair in probe.kv_shapes.values() for shape in pair}
    if len(shapes) != 1:
        raise _refusal(model, "keys and values of several shapes")
    num_kv_heads, head_dim = shapes.pop()
    return num_kv_heads, head_dim


@contextmanager
def _every_linear_sees_every_token(model: PreTrainedModel) -> Iterator[None]:
    """Around one forward of the probe's tokens: an adapted layer takes its tokens to be those of the step, in order.

    Raises:
        InvalidRequestError: a layer that adapters may name saw some of the tokens only, or none.
    """
    num_seen: defaultdict[str, set[int]] = defaultdict(set)

    def counting(path: str) -> Any:
        def count(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            num_seen[path].add(arguments[0].shape[:-1].numel())

        return count

    layers = linear_layers(model)
    hooks = [layer.register_forward_pre_hook(counting(path)) for path, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for path in layers:
        if num_seen[path] != {_PROBE_TOKENS}:
            raise InvalidRequestError(
                f"{type(model).__name__} does not send every token through {path} (an expert's layer?), "
                "so tokens cannot be told apart there",
                param="engine.base",
            )


def _refuse_by_config(model: PreTrainedModel, config: Any, max_tokens: int) -> None:
    """What does not reach the attention function as an argument."""
    if config is not model.config:
        raise _refusal(model, "inputs other than text")
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise _refusal(model, "cross attention")
    if model._is_stateful:
        raise _refusal(model, "a recurrent state")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    for kind, width in (
        ("sliding_attention", getattr(config, "sliding_window", None)),
        ("chunked_attention", getattr(config, "attention_chunk_size", None)),
    ):
        if kind in kinds and width is not None:
            if width < max_tokens:
                raise _refusal(model, _window(f"layers of type {kind}, {width} tokens wide", width))
            kinds.remove(kind)
    if kinds:
        raise _refusal(model, f"layers of type {', '.join(sorted(kinds))}")
    if not model._supports_attention_backend:
        raise _refusal(model, "an attention of its own (no transformers AttentionInterface)")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise _refusal(model, "positions that it counts itself (it takes no position_ids)")
    longest = getattr(config, "max_position_embeddings", max_tokens)
    for rope in _ropes(config):
        original = rope.get("original_max_position_embeddings", longest)
        if rope.get("rope_type") in _BATCH_DEPENDENT_ROPE and max_tokens > original:
            raise _refusal(
                model,
                f"{rope['rope_type']} rotary scaling, which depends on the longest sequence of a batch; "
                f"set max_sequence_tokens to at most {original}",
            )


def _ropes(config: Any) -> list[Mapping[str, Any]]:
    """The rotary settings of all layers, or of each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_kind = [one for one in rope.values() if isinstance(one, Mapping)]
    return by_kind or [rope]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls: query [1, H, T, D], key and value [1, K, T, D], output [1, T, H, D]."""
    backend: Attend = arguments[BACKEND_ARGUMENT]
    if isinstance(backend, AttentionProbe):
        is_self_attention = attention_mask is None and key.shape[2] == query.shape[2]
        backend.check(module, is_self_attention, arguments)
    output_THD = backend.attend(
        int(module.layer_idx),  # type: ignore[arg-type]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scaling if scaling is not None else query.shape[-1] ** -0.5,
    )
    return output_THD[None], None


def _window(what: str, width: int) -> str:
    return f"{what} (set max_sequence_tokens to at most {width}, and it cuts nothing off)"


def _refusal(module: nn.Module, what: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{type(module).__name__} needs {what}, which the engine's attention does not have",
        param="engine.base",
    )


AttentionInterface.register(IMPLEMENTATION, _attention)
