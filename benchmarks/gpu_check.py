"""Are the kernels right on this machine: random layers, ranks, families and mixes against the float64 definition.

The error of every token is held against what its own adapter adds, as in the tests, and a broken adapter is put beside
healthy ones, whose bits must not change. Needs torch and triton only.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu_training_check import check_training
from storage.adapter_rows import AdapterRows, ModuleRows
from storage.identity import AdapterVersion
from workers.attention.pages import PagedAttention
from workers.bank.bank import AdapterBank
from workers.bank.pages import NUM_RESERVED
from workers.kernels.tiles import attention_tile_tokens
from workers.models.runner import SequenceSpan
from workers.row_form.base_linear import DenseLinear
from workers.row_form.cost import KERNEL_COST, CostModel
from workers.row_form.reference import reference_product
from workers.row_form.step_plan import Segment, StepPlan, plan_step

ROW_MODE = CostModel(build_rows=1e9, build_rows_per_rank=0)
WEIGHT_MODE = CostModel(build_rows=-1e9, build_rows_per_rank=0)
BOUND = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
FAMILIES = ("flora", "flora from nothing", "lora", "scaled lora", "both")


@dataclass(frozen=True)
class Sizes:
    features: tuple[int, ...] = (64, 256, 768, 1024, 2048, 5504, 6144)
    ranks: tuple[int, ...] = (1, 2, 3, 4, 8, 16, 17, 32, 64)
    lengths: tuple[int, ...] = (1, 1, 1, 1, 2, 5, 8, 9, 31, 64, 130, 300)
    segments: int = 12
    adapters: int = 8
    longest: int = 6000  # sequence, for attention


TINY = Sizes((16, 40, 72), (1, 2, 5, 17), (1, 1, 3, 9, 33), segments=5, adapters=3, longest=70)


class Mix:
    """One random layer, its adapters, and one step's tokens."""

    def __init__(self, seed: int, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> None:
        self._pick = random.Random(seed)
        self._generator = torch.Generator(device).manual_seed(seed)
        self._device = device
        num_in, num_out = (self._pick.choice(sizes.features) for _ in range(2))
        self.size = self._pick.choice((4e-3, 1e-1, 1.0))
        self.name = f"{num_in} → {num_out}, {dtype}, adapters of {self.size}"
        self.layer = DenseLinear(
            (self._normal(num_out, num_in) / num_in**0.5).to(dtype),
            self._normal(num_out).to(dtype) if self._pick.random() < 0.5 else None,
        )
        self.bank = AdapterBank(
            {"layer": (num_in, num_out)},
            num_rows=sizes.adapters * (2 * max(sizes.ranks) + 2),
            num_slots=sizes.adapters,
            dtype=dtype,
            device=device,
        )
        self.rows = [
            _rounded(self._adapter(self._pick.choice(sizes.ranks), num_in, num_out), dtype)
            for _ in range(sizes.adapters)
        ]
        self.versions = [AdapterVersion(f"{number:064x}") for number in range(sizes.adapters)]
        for version, rows in zip(self.versions, self.rows, strict=True):
            self.bank.load(version, AdapterRows({"layer": rows}))
        self.segments = [
            (self._pick.choice(sizes.lengths), self._pick.choice([None, *range(sizes.adapters)]))
            for _ in range(sizes.segments)
        ]
        self.x_TI = self._normal(sum(count for count, _ in self.segments), num_in).to(dtype)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, device=self._device)

    def _adapter(self, rank: int, num_in: int, num_out: int) -> ModuleRows:
        a_RO = self.size * self._normal(rank, num_out)
        b_RI = self._normal(rank, num_in) / rank**0.5
        q_EO, p_EI = self.size * self._normal(rank, num_out), self._normal(rank, num_in)
        p_EI /= (rank * num_in) ** 0.5
        family = self._pick.choice(FAMILIES)
        if family == "flora":
            return ModuleRows(mul_a_RO=a_RO, mul_b_RI=b_RI)
        if family == "flora from nothing":
            return ModuleRows(mul_a_RO=a_RO / self.size, mul_b_RI=b_RI, offset=0)
        if family == "both":
            return ModuleRows(mul_a_RO=a_RO, mul_b_RI=b_RI, add_q_EO=q_EO, add_p_EI=p_EI)
        scale_O = 1 + self.size * self._normal(num_out) if family == "scaled lora" else None
        return ModuleRows(add_q_EO=q_EO, add_p_EI=p_EI, add_gate=0.5, scale_O=scale_O)

    @property
    def plan(self) -> StepPlan:
        return plan_step(
            [
                Segment(count, () if who is None else ((self._slot(who), 1.0),))
                for count, who in self.segments
            ],
            self.bank.resident_slots,
            self._device,
        )

    def output(self, cost: CostModel) -> Tensor:
        from workers.kernels.product import adapted_product
        from workers.kernels.step_tables import index_for_kernels

        tables = index_for_kernels(self.plan, self.bank.snapshot.table_of["layer"], cost)
        rows = self.bank.modules["layer"]
        return adapted_product(self.x_TI, self.layer, rows.in_rows_NI, rows.out_rows_NO, tables)

    def _slot(self, who: int) -> int:
        slot = self.bank.find(self.versions[who])
        assert slot is not None
        return slot

    def added(self) -> tuple[Tensor, Tensor]:
        """What adapters add to each token, and the base's output, by definition."""
        weight_OI, bias_O = self.layer.weight_OI, self.layer.bias_O
        bias_O = weight_OI.new_zeros(len(weight_OI)) if bias_O is None else bias_O
        pieces, start = [], 0
        for count, who in self.segments:
            x = self.x_TI[start : start + count]
            start += count
            base = reference_product(x, weight_OI, bias_O, None)
            rows = None if who is None else self.rows[who]
            pieces.append((reference_product(x, weight_OI, bias_O, rows) - base, base))
        return torch.cat([one for one, _ in pieces]), torch.cat([one for _, one in pieces])

    def largest_error(self, cost: CostModel) -> float:
        """Per token, relative to what its adapter adds, where that is 1e-3 of the base's output or more."""
        wanted, base = self.added()
        y = self.output(cost).double()
        bank = self.bank.modules["layer"]
        kept = bank.in_rows_NI.clone(), bank.out_rows_NO.clone()
        bank.in_rows_NI[NUM_RESERVED:] = 0
        bank.out_rows_NO[NUM_RESERVED:] = 0
        nothing = self.output(cost).double()
        bank.in_rows_NI.copy_(kept[0])
        bank.out_rows_NO.copy_(kept[1])
        # Without rows an offset of 0 leaves nothing of the base product; what it adds is told from the base itself.
        nothing = torch.where(self._has_offset_0().to(base.device)[:, None], base, nothing)
        counts = wanted.norm(dim=1) >= 1e-3 * base.norm(dim=1)
        if not counts.any():
            return 0.0
        error = (y - nothing - wanted).norm(dim=1) / wanted.norm(dim=1)
        return float(error[counts].max())

    def _has_offset_0(self) -> Tensor:
        """Which tokens the base product does not enter."""
        of_token = [
            who is not None and self.rows[who].offset == 0
            for count, who in self.segments
            for _ in range(count)
        ]
        return torch.tensor(of_token)

    def healthy_bits_change(self, cost: CostModel) -> bool:
        """Whether the first adapter, broken, reaches any token that is not its own."""
        healthy, before = self.healthy_tokens(), self.output(cost)
        with self.first_broken():
            after = self.output(cost)
        return not torch.equal(before[healthy], after[healthy])

    @contextmanager
    def first_broken(self) -> Iterator[None]:
        """The first adapter's rows as no adapter's should be, for a while."""
        place, bank = self.bank.pages_of(self.versions[0])["layer"], self.bank.modules["layer"]
        kept = bank.in_rows_NI.clone(), bank.out_rows_NO.clone()
        bank.in_rows_NI[list(place.in_pages)] = 3e38
        bank.out_rows_NO[list(place.out_pages)] = float("nan")
        try:
            yield
        finally:
            bank.in_rows_NI.copy_(kept[0])
            bank.out_rows_NO.copy_(kept[1])

    def healthy_tokens(self) -> Tensor:
        """Those that are not the first adapter's."""
        healthy = torch.cat([torch.full((count,), who != 0) for count, who in self.segments])
        return healthy.to(self._device)


def check(device: torch.device, *, seeds: int, sizes: Sizes) -> list[str]:
    """One line for everything that is wrong."""
    wrong = []
    for seed in range(seeds):
        dtype = (torch.float32, torch.bfloat16)[seed % 2]
        mix = Mix(seed, sizes, dtype, device)
        for mode, cost in (("row", ROW_MODE), ("weight", WEIGHT_MODE), ("own", KERNEL_COST)):
            error = mix.largest_error(cost)
            told = f"seed {seed}, {mix.name}, {mode} mode: error {error:.2e}"
            print(told, flush=True)
            if not error <= BOUND[dtype]:
                wrong.append(told)
        error = attention_error(seed, dtype, device, longest=sizes.longest)
        told = f"seed {seed}, {dtype}, attention over pages: error {error:.2e}"
        print(told, flush=True)
        if not error <= BOUND[dtype]:
            wrong.append(told)
        error, changed = check_training(mix)
        told = f"seed {seed}, {mix.name}, training in row mode: error {error:.2e}"
        print(told, flush=True)
        if not error <= BOUND[dtype]:
            wrong.append(told)
        if changed:
            wrong.append(f"seed {seed}, training: other bits again, or beside a broken adapter")
        for mode, cost in (("row", ROW_MODE), ("weight", WEIGHT_MODE)):
            if mix.healthy_bits_change(cost):
                wrong.append(f"seed {seed}, {mode} mode: a broken adapter reached its neighbours")
    return wrong


def attention_error(seed: int, dtype: torch.dtype, device: torch.device, *, longest: int) -> float:
    """The kernels beside torch over the same pages, relative to the largest output: prompts, then a token each."""
    pick = random.Random(seed)
    num_kv_heads, group, head_dim = pick.choice((1, 2, 8)), pick.choice((1, 4, 7)), 64
    block_tokens = pick.choice((4, 16))
    lengths = [pick.randint(1, longest) for _ in range(4)]
    most = -(-(longest + 1) // block_tokens)
    attention = PagedAttention(
        num_layers=1,
        num_slots=len(lengths),
        num_kv_heads=num_kv_heads,
        max_tokens_per_slot=longest + 1,
        head_dim=head_dim,
        dtype=dtype,
        device=device,
        num_blocks=most * len(lengths),
        block_tokens=block_tokens,
        tile_tokens=attention_tile_tokens(group),
    )
    order = pick.sample(range(attention.num_blocks), attention.num_blocks)
    blocks = [tuple(order[i * most : (i + 1) * most]) for i in range(len(lengths))]
    generator = torch.Generator(device).manual_seed(seed)
    largest = 0.0
    for starts, counts in (([0] * len(lengths), lengths), (lengths, [1] * len(lengths))):
        attention.begin_step(
            [
                SequenceSpan(i, start, count, blocks[i])
                for i, (start, count) in enumerate(zip(starts, counts, strict=True))
            ]
        )
        query, key, value = (
            torch.randn(sum(counts), heads, head_dim, generator=generator, device=device).to(dtype)
            for heads in (num_kv_heads * group, num_kv_heads, num_kv_heads)
        )
        arguments = (0, query, key, value, head_dim**-0.5)
        ours, theirs = attention.attend(*arguments), attention.attend_with_torch(*arguments)
        largest = max(largest, float((ours - theirs).abs().max() / theirs.abs().max()))
    return largest


def _rounded(rows: ModuleRows, dtype: torch.dtype) -> ModuleRows:
    """As the bank will hold them, so that only arithmetic is compared; c stays, of which it holds c − 1."""
    tensors = {name: tensor.to(dtype) for name, tensor in rows.tensors().items()}
    if rows.scale_O is not None:
        tensors["scale_O"] = 1 + (rows.scale_O.double() - 1).to(dtype).double()
    return ModuleRows(offset=rows.offset, add_gate=rows.add_gate, **tensors)
