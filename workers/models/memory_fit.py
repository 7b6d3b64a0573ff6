"""A loaded model's settings with every size named, so that all it needs fits one budget."""

from __future__ import annotations

import torch

from workers.attention.building import uses_pages
from workers.config import EngineSettings
from workers.memory import MemoryPlan, MemoryShape, plan_memory
from workers.models.runner import ModelShape
from workers.row_form.weight_product import scratch_bound


def fit_memory(
    settings: EngineSettings, model: ModelShape, dtype: torch.dtype, device: torch.device
) -> tuple[EngineSettings, MemoryPlan]:
    """The settings with `bank_rows` and `kv_tokens` as planned. Raises as `plan_memory`."""
    block = settings.kv_block_tokens
    longest = -(-model.max_positions // block) * block
    pages = uses_pages(device)
    shape = MemoryShape.of(
        model.projections,
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        itemsize=dtype.itemsize,
        longest_tokens=longest,
        fixed_tokens=block if pages else settings.max_sequences * longest,
        keeps_blocks=pages or settings.prefix_cache,
        scratch_bytes=scratch_bound(model.projections, settings.max_sequences, dtype),
    )
    plan = plan_memory(settings, shape)
    sizes = {"bank_rows": plan.bank_rows, "kv_tokens": plan.kv_blocks * block}
    return settings.model_copy(update=sizes), plan
