"""One linear layer's training step on a GPU, forward and backward in row mode: our kernels beside torch's loops."""

from __future__ import annotations

import torch

from benchmarks.gpu_layers import DEVICE, DTYPE, HIDDEN
from benchmarks.gpu_timing import Call, in_turns, ratios
from benchmarks.results_file import Row
from storage.adapter_rows import AdapterRows, ModuleRows
from storage.identity import AdapterVersion
from workers.bank.bank import AdapterBank
from workers.kernels.trained_rows import KernelTrainedLoops
from workers.row_form.base_linear import DenseLinear
from workers.row_form.cost import ROW_MODE
from workers.row_form.module_index import index_module_group
from workers.row_form.step_plan import Segment, plan_step
from workers.row_form.trained_rows import TorchTrainedLoops, TrainedLoops, trained_rows


class TrainedLayer:
    """A layer with adapters of one rank in float32, and a step that gives each of them equally many tokens."""

    def __init__(self, adapters: int, tokens: int, rank: int) -> None:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=DEVICE)

        bank = AdapterBank(
            {"layer": (HIDDEN, HIDDEN)},
            num_rows=adapters * rank,
            num_slots=adapters,
            dtype=torch.float32,
            device=DEVICE,
        )
        rows = ModuleRows(mul_a_RO=0.1 * normal(rank, HIDDEN), mul_b_RI=normal(rank, HIDDEN))
        slots = [
            bank.load(AdapterVersion(f"{number:064x}"), AdapterRows({"layer": rows}))
            for number in range(adapters)
        ]
        plan = plan_step(
            [Segment(tokens, ((slot, 1.0),)) for slot in slots], bank.resident_slots, DEVICE
        )
        self._index = index_module_group(plan, bank.snapshot.table_of["layer"], ROW_MODE)
        module = bank.modules["layer"]
        x_TI = normal(adapters * tokens, HIDDEN).to(DTYPE)
        self._leaves = [
            leaf.requires_grad_() for leaf in (x_TI, module.in_rows_NI, module.out_rows_NO)
        ]
        self._base = DenseLinear((normal(HIDDEN, HIDDEN) / HIDDEN**0.5).to(DTYPE))
        self._pull = normal(adapters * tokens, HIDDEN).to(DTYPE)

    def step(self, loops: TrainedLoops) -> Call:
        x, b, a = self._leaves

        def run() -> object:
            y = trained_rows(x, self._base, b, a, self._index, loops, is_last=True)
            return torch.autograd.grad(y, self._leaves, self._pull)

        return run


def trained_layer(rounds: int) -> list[Row]:
    rows = []
    for adapters, tokens, rank in ((8, 512, 1), (32, 32, 4), (8, 128, 16)):
        layer = TrainedLayer(adapters, tokens, rank)
        sides = {
            "kernels": layer.step(KernelTrainedLoops()),
            "torch": layer.step(TorchTrainedLoops()),
        }
        took = in_turns(sides, rounds)
        name = f"training a layer, FLoRA r{rank}, {adapters} adapters of {tokens} tokens"
        rows += [
            Row(
                f"{name}, tokens/s: kernels / torch's loops", ratios(took["torch"], took["kernels"])
            ),
            Row(
                f"{name}: kernels, tokens/s",
                tuple(adapters * tokens / second for second in took["kernels"]),
            ),
        ]
    return rows
