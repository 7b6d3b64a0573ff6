"""One linear layer on a GPU: adapted beside plain, and beside what the card itself allows.

Every side runs its layer on several weights in turn, replayed from one graph, so that W0 comes from memory each time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gpu_timing import Call, copies_for, ratios, replays
from benchmarks.results_file import Row
from storage.adapter_rows import AdapterRows, ModuleRows
from storage.identity import AdapterVersion
from workers.bank.bank import AdapterBank
from workers.row_form.base_linear import DenseLinear
from workers.row_form.cost import KERNEL_COST
from workers.row_form.step_plan import Segment, plan_step

HIDDEN, MLP = 6144, 24576
DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
Times = tuple[float, ...]


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def weights(num_in: int, num_out: int) -> list[DenseLinear]:
    return [
        DenseLinear(_normal(num_out, num_in) / num_in**0.5)
        for _ in range(copies_for(2 * num_in * num_out))
    ]


class AdaptedLayers:
    """Layers of one shape, with adapters of one rank, and a step that gives every adapter equally many tokens."""

    def __init__(
        self, layers: list[DenseLinear], family: str, rank: int, adapters: int, tokens: int
    ) -> None:
        from workers.kernels.step_tables import index_for_kernels

        self.layers = layers
        num_out, num_in = layers[0].weight_OI.shape
        names = [str(number) for number in range(len(layers))]
        self.bank = AdapterBank(
            dict.fromkeys(names, (num_in, num_out)),
            num_rows=adapters * rank,
            num_slots=adapters,
            dtype=DTYPE,
            device=DEVICE,
        )
        rows = (
            ModuleRows(mul_a_RO=0.1 * _normal(rank, num_out), mul_b_RI=_normal(rank, num_in))
            if family == "flora"
            else ModuleRows(
                add_q_EO=0.1 * _normal(rank, num_out),
                add_p_EI=_normal(rank, num_in) / num_in**0.5,
            )
        )
        slots = [
            self.bank.load(
                AdapterVersion(f"{number:064x}"), AdapterRows(dict.fromkeys(names, rows))
            )
            for number in range(adapters)
        ]
        self.x_TI = _normal(tokens, num_in)
        plan = plan_step(
            [Segment(tokens // adapters, ((slot, 1.0),)) for slot in slots],
            self.bank.resident_slots,
            DEVICE,
        )
        self.tables = index_for_kernels(plan, self.bank.snapshot.table_of["0"], KERNEL_COST)

    @property
    def ours(self) -> list[Call]:
        from workers.kernels.product import KernelRows

        product = KernelRows().product

        def call(layer: DenseLinear, name: str) -> Call:
            rows = self.bank.modules[name]
            return lambda: product(self.x_TI, layer, rows.in_rows_NI, rows.out_rows_NO, self.tables)

        return [call(layer, str(number)) for number, layer in enumerate(self.layers)]

    @property
    def plain(self) -> list[Call]:
        return plain(self.layers, len(self.x_TI))


def plain(layers: list[DenseLinear], tokens: int) -> list[Call]:
    """The library's own product of as many rows."""
    x_TI = _normal(tokens, layers[0].in_features)
    return [lambda layer=layer: layer.matmul(x_TI) for layer in layers]  # type: ignore[misc]


def floors(rounds: int) -> list[Row]:
    """What the card does at best, for scale."""
    source = torch.empty(1 << 30, dtype=torch.int32, device=DEVICE)
    target = torch.empty_like(source)
    copied = replays({"copy": [lambda: target.copy_(source)]}, rounds)["copy"]
    moved = 2 * source.nbytes
    side = 8192
    one, other = _normal(side, side), _normal(side, side)
    product = replays({"product": [lambda: one @ other]}, rounds)["product"]
    return [
        Row(
            "floor: copy, TB/s read and written", tuple(moved / second / 1e12 for second in copied)
        ),
        Row(
            f"floor: {side}³ bfloat16 product, TFLOP/s",
            tuple(2 * side**3 / second / 1e12 for second in product),
        ),
    ]


def layers(rounds: int) -> list[Row]:
    """The layer rows of the table. A row that fails is told as a row less, with its reason printed."""
    found: list[Row] = []
    for measured in (_few_rows, _many_rows, _prefill, _add_rows):
        try:
            found += measured(rounds)
        except Exception as error:
            print(f"NOT MEASURED  {measured.__name__}: {type(error).__name__}: {error}", flush=True)
        torch.cuda.empty_cache()
    if not found:
        raise RuntimeError("no layer could be measured")
    return found


def _few_rows(rounds: int) -> list[Row]:
    rows = []
    for num_in, num_out in ((HIDDEN, HIDDEN), (HIDDEN, MLP), (MLP, HIDDEN)):
        side = AdaptedLayers(weights(num_in, num_out), "flora", 3, adapters=32, tokens=32)
        times = replays(
            {
                "ours": side.ours,
                "base": side.plain,
                "floor": plain(side.layers, 128),
            },
            rounds,
        )
        shape = f"{num_in} → {num_out}"
        rows += [
            Row(
                f"FLoRA r3, 32 tokens of 32 adapters / base layer, {shape}",
                ratios(times["ours"], times["base"]),
                1.2,
                "lower",
            ),
            Row(
                f"the same / the library's product of 128 rows, {shape}",
                ratios(times["ours"], times["floor"]),
            ),
            _microseconds(f"the same, {shape}, µs", times["ours"]),
            _microseconds(f"base layer, 32 tokens, {shape}, µs", times["base"]),
        ]
        del side
        torch.cuda.empty_cache()
    return rows


def _many_rows(rounds: int) -> list[Row]:
    side = AdaptedLayers(weights(HIDDEN, HIDDEN), "flora", 8, adapters=64, tokens=64)
    times = replays(
        {"ours": side.ours, "weights": side.plain, "rows": plain(side.layers, 64 * 9)}, rounds
    )
    floor = tuple(max(pair) for pair in zip(times["weights"], times["rows"], strict=True))
    return [
        Row(
            "FLoRA r8, 64 tokens of 64 adapters / larger floor (weights read; 576 rows)",
            ratios(times["ours"], floor),
            1.6,
            "lower",
        ),
        _microseconds("the same, µs", times["ours"]),
    ]


def _prefill(rounds: int) -> list[Row]:
    side = AdaptedLayers(weights(HIDDEN, HIDDEN), "flora", 16, adapters=8, tokens=4096)
    times = replays({"ours": side.ours, "base": side.plain}, rounds)
    return [
        Row(
            "FLoRA r16, prefill of 4096 tokens of 8 adapters / base layer",
            ratios(times["ours"], times["base"]),
            2.4,
            "lower",
        ),
        _microseconds("the same, µs", times["ours"]),
    ]


def _add_rows(rounds: int) -> list[Row]:
    rank, count = 16, 64
    side = AdaptedLayers(weights(HIDDEN, HIDDEN), "lora", rank, adapters=count, tokens=count)
    p_TIE, q_TEO = _normal(count, HIDDEN, rank), _normal(count, rank, HIDDEN)
    # As many different rows as our side reads, or the cache would hold the peer's.
    p_more = [p_TIE, *(p_TIE.clone() for _ in side.layers[1:])]
    q_more = [q_TEO, *(q_TEO.clone() for _ in side.layers[1:])]

    def grouped(layer: DenseLinear, p_TIE: Tensor, q_TEO: Tensor) -> Call:
        def run() -> Tensor:
            dot_T1E = torch.bmm(side.x_TI[:, None], p_TIE)
            return layer.matmul(side.x_TI) + torch.bmm(dot_T1E, q_TEO)[:, 0]

        return run

    sides = {
        "ours": side.ours,
        "base": side.plain,
        "bmm": [grouped(*parts) for parts in zip(side.layers, p_more, q_more, strict=True)],
    }
    peer = _vllm_kernels(side, rank)
    if peer is not None:
        sides["vllm"] = peer
    times = replays(sides, rounds)
    name = f"base + LoRA r{rank}, {count} tokens of {count} adapters"
    rows = [
        Row(f"{name} / grouped torch.bmm", ratios(times["ours"], times["bmm"]),
            None if peer else 1.0, "lower"),
        Row(f"{name} / base layer", ratios(times["ours"], times["base"]), None, "lower"),
        _microseconds(f"{name}, µs", times["ours"]),
    ]  # fmt: skip
    if peer is not None:
        rows.append(
            Row(
                f"{name} / vLLM's Triton kernels",
                ratios(times["ours"], times["vllm"]),
                1.0,
                "lower",
            )
        )
    return rows


def _vllm_kernels(side: AdaptedLayers, rank: int) -> list[Call] | None:
    """Base product, shrink and expand as vLLM runs them; None where vLLM is not installed."""
    try:
        from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink
    except ImportError:
        return None

    tokens, num_in = side.x_TI.shape
    num_out = side.layers[0].out_features
    meta = LoRAKernelMeta.make(tokens, tokens, device=DEVICE)
    meta.prepare_tensors(torch.arange(tokens, dtype=torch.int32, device=DEVICE))
    arguments = meta.meta_args(tokens, False)

    def call(layer: DenseLinear) -> Call:
        shrink = _normal(tokens, 1, rank, num_in)
        expand = _normal(tokens, 1, num_out, rank)
        dots = torch.empty(1, tokens, rank, dtype=torch.float32, device=DEVICE)

        def run() -> Tensor:
            y = layer.matmul(side.x_TI)
            lora_shrink(side.x_TI, [shrink], dots, *arguments, 1.0)
            lora_expand(dots, [expand], y, *arguments, offset_start=0, add_inputs=True)
            return y

        return run

    return [call(layer) for layer in side.layers]


def _microseconds(name: str, times: Times) -> Row:
    return Row(name, tuple(second * 1e6 for second in times), None, "lower")


def tune(rounds: int) -> None:
    """Print how long stacked rows and weight mode take with other tiles than workers/kernels/tiles.py chooses."""
    from workers.kernels import product

    choices: dict[str, list[dict[str, int]]] = {
        "stacked_tiles": [
            {"outs": outs, "ins": ins, "splits": splits, "warps": warps, "stages": stages}
            for outs in (64, 128)
            for ins in (64, 128)
            for splits in (1, 2, 3, 4)
            for warps in (4, 8)
            for stages in (3, 4)
        ],
        "weight_tiles": [
            {"outs": outs, "ins": ins, "warps": warps, "stages": stages}
            for outs in (64, 128, 256)
            for ins in (32, 64)
            for warps in (4, 8)
            for stages in (2, 3, 4)
        ],
    }
    sides: dict[str, list[Callable[[], AdaptedLayers]]] = {
        "stacked_tiles": [
            lambda: AdaptedLayers(weights(HIDDEN, HIDDEN), "flora", 3, adapters=32, tokens=32),
            lambda: AdaptedLayers(weights(HIDDEN, MLP), "flora", 1, adapters=32, tokens=32),
            lambda: AdaptedLayers(weights(HIDDEN, HIDDEN), "flora", 8, adapters=64, tokens=64),
        ],
        "weight_tiles": [
            lambda: AdaptedLayers(weights(HIDDEN, HIDDEN), "flora", 16, adapters=8, tokens=4096)
        ],
    }
    for name, makers in sides.items():
        chosen = getattr(product, name)
        for number, make in enumerate(makers):
            side = make()
            for change in [{}, *choices[name]]:
                setattr(product, name, lambda *a, c=change, f=chosen: replace(f(*a), **c))
                try:
                    seconds = min(replays({"ours": side.ours}, rounds)["ours"])
                except Exception as error:  # a tile may need more than a program can have
                    print(f"{name} {number} {change}: {type(error).__name__}", flush=True)
                else:
                    print(f"{name} {number} {seconds * 1e6:8.1f} µs  {change}", flush=True)
            setattr(product, name, chosen)
