"""Writes a Llama as GGUF the way llama.cpp's converter does, so that nothing of the reader under test is used."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OTHER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf(directory: Path, file: Path) -> None:
    """`down_proj` in blocks of 8 bits; the weights that makes are put back into the safetensors of `directory`."""
    config = json.loads((directory / "config.json").read_bytes())
    tensors = load_file(directory / "model.safetensors")
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, directory, config)
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    for name, tensor in tensors.items():
        short = _gguf_name(name)
        kind = short.split(".")[-2]
        data = tensor.float().numpy()
        if kind in heads:
            data = _interleaved(data, heads[kind])
        if kind == "ffn_down":
            packed = gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q8_0)
            tensors[name] = torch.from_numpy(
                gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
            )
            writer.add_tensor(short, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(short, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(_contiguous(tensors), directory / "model.safetensors", metadata={"format": "pt"})


def _add_tokenizer(writer: gguf.GGUFWriter, directory: Path, config: dict[str, int]) -> None:
    described = json.loads((directory / "tokenizer.json").read_bytes())
    vocabulary = described["model"]["vocab"]
    special = {one["content"] for one in described["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    )
    writer.add_token_merges([" ".join(pair) for pair in described["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def _gguf_name(name: str) -> str:
    if name in _OTHER:
        return _OTHER[name]
    _, _, number, *module, _ = name.split(".")
    return f"blk.{number}.{_LAYER['.'.join(module)]}.weight"


def _interleaved(weight_OI: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring pairs of a head's features, transformers its two halves."""
    num_out, num_in = weight_OI.shape
    halves = weight_OI.reshape(num_heads, 2, num_out // num_heads // 2, num_in)
    return halves.swapaxes(1, 2).reshape(num_out, num_in)


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
