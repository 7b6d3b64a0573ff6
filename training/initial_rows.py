"""How an adapter's rows begin. They depend on its own seed and the module's path, never on its neighbours.

Every family begins as the base model itself, and no two rows of a module begin alike: equal rows get equal gradients
and stay equal, which wastes all but one of them.

Shape legend: I input features, O output features, R rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from storage.adapter_rows import AdapterRows, ModuleRows
from storage.errors import SpecificationError
from training.example_stream import mixed_seed
from training.spec import ALL_LINEAR, AdapterSpec, matches
from workers.bank.layout import ModuleLayout


def check_targets(spec: AdapterSpec, projections: Collection[str]) -> None:
    """Raises SpecificationError for a target, or a rank's pattern, that fits no projection of the model."""
    for pattern in spec.rank_pattern:
        if not any(spec.targets(path) and matches(pattern, path) for path in projections):
            raise SpecificationError(
                f"{spec.name}: no module that it targets fits the pattern {pattern!r}",
                param="rank_pattern",
            )
    for end in () if spec.target_modules == ALL_LINEAR else spec.target_modules:
        if not any(path == end or path.endswith(f".{end}") for path in projections):
            known = ", ".join(sorted({path.rpartition(".")[2] for path in projections}))
            raise SpecificationError(
                f"{spec.name}: the model has no linear layer {end!r}; it has {known}",
                param="target_modules",
            )


def row_layouts(
    spec: AdapterSpec, projections: Collection[str], biased: Collection[str]
) -> dict[str, ModuleLayout]:
    """The shape of what `initial_rows` makes, in a model whose projections `biased` have a bias. Raises as it does."""
    check_targets(spec, projections)
    return {
        path: _module_layout(spec, path, path in biased)
        for path in projections
        if spec.targets(path)
    }


def _module_layout(spec: AdapterSpec, path: str, has_bias: bool) -> ModuleLayout:
    if spec.family == "ia3":
        if spec.scales_input(path):
            return ModuleLayout(num_mul=1, has_a=False)
        return ModuleLayout(has_scale=True, has_bias=has_bias)
    rank = spec.rank_of(path)
    if spec.family == "flora":
        return ModuleLayout(num_mul=rank, offset=spec.offset)
    return ModuleLayout(
        num_add=rank, add_gate=spec.scaling_of(path), has_scale=spec.family == "dora"
    )


def initial_rows(
    spec: AdapterSpec, projections: Mapping[str, tuple[int, int]], dtype: torch.dtype
) -> AdapterRows:
    """The rows of a new adapter on every projection it targets. Raises as `check_targets`."""
    check_targets(spec, projections)
    return AdapterRows(
        {
            path: _module_rows(spec, path, shape, dtype)
            for path, shape in projections.items()
            if spec.targets(path)
        }
    )


def _module_rows(
    spec: AdapterSpec, path: str, shape: tuple[int, int], dtype: torch.dtype
) -> ModuleRows:
    num_in, num_out = shape
    if spec.family == "ia3":
        if spec.scales_input(path):
            return ModuleRows(mul_b_RI=torch.zeros(1, num_in, dtype=dtype))
        ones_O = torch.ones(num_out, dtype=dtype)
        return ModuleRows(scale_O=ones_O, bias_scale_O=ones_O)
    rank = spec.rank_of(path)
    assert spec.seed is not None
    generator = torch.Generator().manual_seed(mixed_seed(spec.seed, "rows", path))
    in_RI = _kaiming_uniform(rank, num_in, generator).to(dtype)
    out_RO = torch.zeros(rank, num_out, dtype=dtype)
    if spec.family != "flora":
        # DoRA's magnitudes begin as the base's own, which makes a scale of ones.
        scale_O = torch.ones(num_out, dtype=dtype) if spec.family == "dora" else None
        return ModuleRows(
            add_p_EI=in_RI, add_q_EO=out_RO, add_gate=spec.scaling_of(path), scale_O=scale_O
        )
    if spec.offset == 0:
        # Without an offset the rows themselves must sum to ones. One row carries them all; the paper's all-ones start
        # for every row would make the rows equal.
        in_RI[0] = 1
        out_RO[0] = 1
    return ModuleRows(mul_b_RI=in_RI, mul_a_RO=out_RO, offset=spec.offset)


def _kaiming_uniform(rank: int, num_in: int, generator: torch.Generator) -> Tensor:
    """As PEFT begins hira_A and lora_A: uniform within ±1/√in (`kaiming_uniform_` with a = √5)."""
    bound: float = num_in**-0.5
    return (torch.rand(rank, num_in, generator=generator) * 2 - 1) * bound
