"""Real adapters in a real registry, small enough to make by the dozen."""

from __future__ import annotations

import torch

from storage.adapter_rows import AdapterRows, ModuleRows
from storage.base_checkpoint import BaseFacts
from storage.formats.writing import write_flora
from storage.identity import AdapterName, AdapterVersion
from storage.publishing import publish_adapter
from storage.registry import Registry

PATH = "model.layers.0.self_attn.q_proj"
BASE = BaseFacts("ab" * 32, "tiny", {PATH: (16, 16)})
ROWS_BYTES = 2 * 2 * 16 * 4


def rows_of(seed: int) -> AdapterRows:
    generator = torch.Generator().manual_seed(seed)
    return AdapterRows(
        {
            PATH: ModuleRows(
                mul_b_RI=torch.randn(2, 16, generator=generator),
                mul_a_RO=torch.randn(2, 16, generator=generator),
            )
        },
        BASE.digest,
    )


def publish_rows(registry: Registry, seed: int) -> AdapterVersion:
    files = write_flora(rows_of(seed), "tiny")
    return publish_adapter(registry, AdapterName("team", f"adapter-{seed}"), files, BASE).version


def is_same(found: AdapterRows, seed: int) -> bool:
    expected = rows_of(seed)
    return found.base_digest == expected.base_digest and all(
        torch.equal(found.modules[PATH].tensors()[name], tensor)
        for name, tensor in expected.modules[PATH].tensors().items()
    )
