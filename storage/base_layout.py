"""Which tensor of a checkpoint is which layer of the model, by architecture. Names and shapes only.

Adapters name layers by transformers' module paths. A checkpoint mostly does too, but one of the bare decoder leaves
out the decoder's own name (the hub's GPT-2 has `h.0.attn…`, its model `transformer.h.0.attn…`), and GPT-2's layers
store their weight [in, out].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_WEIGHT = ".weight"
_NOT_ADAPTED = frozenset(
    {
        *("embed_tokens", "embed_in", "wte", "wpe", "embed_positions", "word_embeddings", "shared"),
        *("lm_head", "embed_out"),
    }
)


@dataclass(frozen=True, slots=True)
class _Architecture:
    """`decoder`: the path of the decoder in the model. `in_out`: layers whose weight is stored [in, out]."""

    decoder: str
    in_out: frozenset[str] = frozenset()


_ARCHITECTURES: Mapping[str, _Architecture] = {
    **dict.fromkeys(
        (
            *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
            *("phi", "phi3", "starcoder2", "opt", "olmo2"),
        ),
        _Architecture("model"),
    ),
    "gpt2": _Architecture("transformer", frozenset({"c_attn", "c_proj", "c_fc"})),
    "gpt_bigcode": _Architecture("transformer"),
    "gpt_neox": _Architecture("gpt_neox"),
}

_LLAMA_GGUF = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF: Mapping[str, tuple[str, Mapping[str, str]]] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"), ("model.layers", _LLAMA_GGUF)
    ),
    "phi3": (
        "model.layers",
        {
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
    ),
    "starcoder2": (
        "model.layers",
        {**_LLAMA_GGUF, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
    ),
    "gpt2": (
        "transformer.h",
        {
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
    ),
}

GGUF_ARCHITECTURES = tuple(sorted(_GGUF))
"""The values of `general.architecture` whose layers are known."""


def is_known(model_type: str | None) -> bool:
    """Of an architecture that is not, `projections` is what the tensors look like, and may be wrong."""
    return model_type in _ARCHITECTURES


def projections(
    model_type: str | None, shapes: Iterable[tuple[str, tuple[int, ...]]]
) -> dict[str, tuple[int, int]]:
    """Module path → (in, out) features of the linear layers among a checkpoint's tensors (name, shape)."""
    architecture = _ARCHITECTURES.get(model_type or "")
    found = {}
    for name, shape in shapes:
        path = name.removesuffix(_WEIGHT)
        if not name.endswith(_WEIGHT) or len(shape) != 2 or _last(path) in _NOT_ADAPTED:
            continue
        num_out, num_in = shape
        if architecture is not None:
            if _last(path) in architecture.in_out:
                num_in, num_out = shape
            if not path.startswith(f"{architecture.decoder}."):
                path = f"{architecture.decoder}.{path}"
        found[path] = (num_in, num_out)
    return found


def gguf_projections(
    architecture: str, shapes: Iterable[tuple[str, tuple[int, ...]]]
) -> dict[str, tuple[int, int]]:
    """As `projections`, of a GGUF file's tensors (name, ggml's shape, which begins with the in features).

    Raises:
        KeyError: the architecture is not one of `GGUF_ARCHITECTURES`.
    """
    layers, names = _GGUF[architecture]
    found = {}
    for name, shape in shapes:
        match name.split("."):
            case ["blk", number, kind, "weight"] if kind in names:
                found[f"{layers}.{number}.{names[kind]}"] = (shape[0], shape[1])
    return found


def _last(path: str) -> str:
    return path.rpartition(".")[2]
