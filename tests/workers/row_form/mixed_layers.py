"""Random adapters of every family over a few random layers, and the step that mixes them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from storage.adapter_rows import AdapterRows, ModuleRows
from storage.identity import AdapterVersion
from workers.bank.bank import AdapterBank
from workers.row_form.adapted_linear import Product
from workers.row_form.adapted_product import adapted_product
from workers.row_form.base_linear import DenseLinear
from workers.row_form.cost import CostModel
from workers.row_form.module_index import index_module_group
from workers.row_form.reference import reference_product
from workers.row_form.step_plan import Segment, StepPlan, plan_step

ROW_MODE = CostModel(build_rows=1e9, build_rows_per_rank=0, thin_product_tokens=10**9)
WEIGHT_MODE = CostModel(build_rows=-1e9, build_rows_per_rank=0, thin_product_tokens=0)
MERGED_MODE = CostModel(build_rows=-1e9, build_rows_per_rank=0, thin_product_tokens=0, merged=True)
MIXED_MODES = CostModel(build_rows=4, build_rows_per_rank=0, thin_product_tokens=3)
MODES = (ROW_MODE, WEIGHT_MODE, MERGED_MODE, MIXED_MODES)
SHAPES = {"first": (24, 40), "second": (40, 24)}
# Every family beside the others and base tokens, runs short and long, ranks that differ from layer to layer.
MIX = [
    {"first": ("flora", 1), "second": ("flora", 64)},
    {"first": ("lora", 8), "second": ("untouched", 1)},
    {"first": ("flora", 4), "second": ("lora", 2)},
    {"first": ("dora", 3), "second": ("flora+lora", 5)},
    {"first": ("ia3_in", 1), "second": ("ia3_out", 1)},
    {"first": ("ia3_out", 1), "second": ("ia3_in", 1)},
    {"first": ("lora+bias", 2), "second": ("dora", 64)},
    {"first": ("own_bias", 1), "second": ("lora+bias", 16)},
    {"first": ("flora", 64), "second": ("own_bias", 1)},
]
SEGMENTS: list[tuple[int, int | None]] = [
    (1, 0), (5, None), (7, 1), (1, 2), (1, 3), (1, None), (70, 2), (9, 3), (7, 0),
    (1, 4), (8, 4), (1, 5), (6, 5), (1, 6), (5, 6), (1, 7), (3, 7), (1, 8), (20, 8),
]  # fmt: skip
FAMILIES = (
    "flora",
    "flora0",
    "lora",
    "dora",
    "ia3_in",
    "ia3_out",
    "flora+lora",
    "lora+bias",
    "own_bias",
    "untouched",
)


def random_rows(
    family: str, rank: int, num_in: int, num_out: int, size: float, generator: torch.Generator
) -> ModuleRows | None:
    """One adapter in one module. `size` is about the share of the base output that it adds."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def near_one(count: int) -> Tensor:
        return 1 + size * normal(count)

    a_RO, b_RI = size * normal(rank, num_out), normal(rank, num_in) / max(rank, 1) ** 0.5
    p_EI, q_EO = normal(rank, num_in) / num_in**0.5, size * normal(rank, num_out)
    match family:
        case "flora":
            return ModuleRows(mul_a_RO=a_RO, mul_b_RI=b_RI)
        case "flora0":
            return ModuleRows(mul_a_RO=normal(rank, num_out), mul_b_RI=b_RI, offset=0)
        case "lora":
            return ModuleRows(add_q_EO=q_EO, add_p_EI=p_EI, add_gate=0.5)
        case "dora":
            # The weights' rows have norms of about 1: a magnitude near 1 is a scale near 1.
            return ModuleRows(
                add_q_EO=q_EO, add_p_EI=p_EI, add_gate=2.0, magnitude_O=near_one(num_out)
            )
        case "ia3_in":
            return ModuleRows(mul_b_RI=size * normal(1, num_in))
        case "ia3_out":
            l_O = near_one(num_out)
            return ModuleRows(scale_O=l_O, bias_scale_O=l_O)
        case "flora+lora":
            return ModuleRows(mul_a_RO=a_RO, mul_b_RI=b_RI, add_q_EO=q_EO, add_p_EI=p_EI)
        case "lora+bias":
            return ModuleRows(
                add_q_EO=q_EO, add_p_EI=p_EI, add_gate=0.5, bias_shift_O=size * normal(num_out)
            )
        case "own_bias":
            return ModuleRows(bias_O=normal(num_out))
        case _:
            return None


@dataclass(frozen=True)
class MixedLayers:
    """Layers, the adapters loaded over them, and one step's tokens."""

    layers: dict[str, DenseLinear]
    bank: AdapterBank
    adapters: dict[AdapterVersion, AdapterRows]
    segments: list[tuple[int, AdapterVersion | None]]
    x: dict[str, Tensor]  # layer → x_TI

    @property
    def plan(self) -> StepPlan:
        slots = {version: self.bank.acquire(version) for version in self.adapters}
        segments = [
            Segment(count, () if version is None else ((slots[version], 1.0),))
            for count, version in self.segments
        ]
        plan = plan_step(segments, self.bank.resident_slots, torch.device("cpu"))
        for version in self.adapters:
            self.bank.release(version)
        return plan

    def output(self, path: str, cost: CostModel, product: Product = adapted_product) -> Tensor:
        index = index_module_group(self.plan, self.bank.snapshot.table_of[path], cost)
        rows = self.bank.modules[path]
        layer = self.layers[path]
        return product(self.x[path], layer, rows.in_rows_NI, rows.out_rows_NO, index)

    def reference(self, path: str, *, with_adapters: bool = True) -> Tensor:
        layer, pieces, start = self.layers[path], [], 0
        for count, version in self.segments:
            rows = self.adapters[version].modules.get(path) if version is not None else None
            x = self.x[path][start : start + count]
            used = rows if with_adapters else None
            pieces.append(reference_product(x, layer.weight_OI, layer.bias_O, used))
            start += count
        return torch.cat(pieces)


def mixed_layers(
    *,
    seed: int,
    shapes: dict[str, tuple[int, int]],
    adapters: list[dict[str, tuple[str, int]]],
    segments: list[tuple[int, int | None]],
    dtype: torch.dtype,
    size: float = 0.1,
    num_rows: int = 512,
    rounded: bool = False,
) -> MixedLayers:
    """Args: shapes: layer → (in, out); adapters: layer → (family, rank) each; segments: (tokens, adapter or None);
    rounded: make rows of values that `dtype` has.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    layers = {
        path: DenseLinear(
            (normal(num_out, num_in) / num_in**0.5).to(dtype), normal(num_out).to(dtype)
        )
        for path, (num_in, num_out) in shapes.items()
    }
    biases = {path: layer.bias_O for path, layer in layers.items() if layer.bias_O is not None}
    bank = AdapterBank(
        shapes,
        num_rows=num_rows,
        num_slots=len(adapters) + 1,
        dtype=dtype,
        device=torch.device("cpu"),
        biases=biases,
        base_weight=lambda path: layers[path].weight_OI,
    )
    made = {}
    for i, families in enumerate(adapters):
        modules = {}
        for path, (family, rank) in families.items():
            rows = random_rows(family, rank, *shapes[path], size, generator)
            if rows is not None:
                modules[path] = _rounded(rows, dtype) if rounded else rows
        version = AdapterVersion(f"{i:064x}")
        made[version] = AdapterRows(modules)
        bank.load(version, made[version])
    versions = list(made)
    num_tokens = sum(count for count, _ in segments)
    x = {path: normal(num_tokens, num_in).to(dtype) for path, (num_in, _) in shapes.items()}
    named = [(count, None if i is None else versions[i]) for count, i in segments]
    return MixedLayers(layers, bank, made, named, x)


def _rounded(rows: ModuleRows, dtype: torch.dtype) -> ModuleRows:
    """Rows as the bank will hold them; a scale and a bias as they are, of which it holds a difference."""
    sides = {
        name: tensor.to(dtype)
        for name, tensor in rows.tensors().items()
        if name.startswith(("mul", "add"))
    }
    return replace(rows, **sides)  # type: ignore[arg-type]
