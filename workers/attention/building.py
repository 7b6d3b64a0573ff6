"""Which attention a runner gets: the one place that decides."""

from __future__ import annotations

import torch

from workers.attention.backend import AttentionBackend
from workers.attention.pages import PagedAttention
from workers.attention.slabs import SlabAttention
from workers.compiled.decoder_loops import SlabLoops
from workers.config import EngineSettings
from workers.kernels.tiles import attention_tile_tokens


def uses_pages(device: torch.device) -> bool:
    """Pages share prefixes for nothing; slabs are what a CPU reads fastest."""
    return device.type == "cuda"


def build_attention(
    settings: EngineSettings,
    *,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    loops: SlabLoops | None,
    has_kernels: bool,
) -> AttentionBackend:
    """A cache for `settings.max_sequences` sequences of up to `max_tokens` tokens.

    Args:
        loops: what decodes over slabs; None: torch's own attention.
        has_kernels: Triton's may be used over pages.
    """
    if uses_pages(device):
        return PagedAttention(
            num_layers=num_layers,
            num_slots=settings.max_sequences,
            num_kv_heads=num_kv_heads,
            max_tokens_per_slot=max_tokens,
            head_dim=head_dim,
            dtype=dtype,
            device=device,
            num_blocks=settings.kv_blocks,
            block_tokens=settings.kv_block_tokens,
            tile_tokens=attention_tile_tokens(num_heads // num_kv_heads) if has_kernels else None,
        )
    return SlabAttention(
        num_layers=num_layers,
        num_slots=settings.max_sequences,
        num_kv_heads=num_kv_heads,
        max_tokens_per_slot=max_tokens,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
        num_blocks=settings.kv_blocks if settings.prefix_cache else 0,
        block_tokens=settings.kv_block_tokens,
        loops=loops,
    )
