"""Whole models on a GPU: FLoRA beside LoRA by gathered products, the engine beside the time to read its weights."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu_timing import capture, in_turns, ratios
from benchmarks.results_file import Row
from storage.adapter_rows import AdapterRows, ModuleRows
from storage.identity import AdapterSet, AdapterVersion
from workers.bank.bank import AdapterBank
from workers.bank.loader import AdapterLoader
from workers.config import EngineSettings
from workers.engine.engine import Engine
from workers.engine.request import EngineRequest, SamplingParams
from workers.models.arithmetic import Arithmetic, kernel_arithmetic
from workers.models.loading import LoadedBase
from workers.models.native.runner import NativeRunner
from workers.models.runner import SequenceSpan, StepInput
from workers.row_form.base_linear import BaseLinear
from workers.row_form.cost import ROW_MODE
from workers.row_form.module_index import ModuleIndex, index_module_group
from workers.row_form.step_plan import Segment, plan_step

BATCH, CONTEXT = 32, 256
DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
ONE_BILLION = LlamaConfig(
    vocab_size=32_000,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
)


def gathered_lora(
    x_TI: Tensor, base: BaseLinear, in_rows_NI: Tensor, out_rows_NO: Tensor, index: ModuleIndex
) -> Tensor:
    """The paper's appendix: every token's own A and B gathered, then two batched products."""
    if index.add is None:
        raise ValueError("this peer computes LoRA only")
    p_T1I = in_rows_NI.index_select(0, index.add.in_page_R)[:, None]
    q_T1O = out_rows_NO.index_select(0, index.add.out_page_R)[:, None]
    dot_T11 = torch.bmm(x_TI[:, None], p_T1I.transpose(1, 2))
    return base.matmul(x_TI) + torch.bmm(dot_T11, q_T1O)[:, 0]


class Decoding:
    """A runner in the middle of decoding: BATCH sequences of CONTEXT tokens, each with an adapter of rank 1 or none."""

    def __init__(self, family: str | None, arithmetic: Arithmetic) -> None:
        # Graphs are recorded here, of every side alike.
        self.runner = NativeRunner(_random_base(), _settings(decode_graphs=False), arithmetic)
        self.bank = _bank(self.runner, BATCH)
        slots = [] if family is None else _load(self.bank, self.runner, family, BATCH)
        per_sequence = CONTEXT // _settings().kv_block_tokens + 1
        spans = tuple(
            SequenceSpan(
                number, CONTEXT, 1, tuple(range(number * per_sequence, (number + 1) * per_sequence))
            )
            for number in range(BATCH)
        )
        segments = [Segment(1, ((slots[number], 1.0),) if slots else ()) for number in range(BATCH)]
        self._step = StepInput(
            token_ids_T=torch.randint(3, 30_000, (BATCH,), device=DEVICE),
            positions_T=torch.full((BATCH,), CONTEXT, device=DEVICE),
            spans=spans,
            plan=plan_step(segments, self.bank.resident_slots, DEVICE),
            logits_of_L=torch.arange(BATCH, device=DEVICE),
        )

    def eager(self) -> None:
        """A whole step as while the same sequences decode: tables known, model run."""
        self.runner.forward(self._step)

    def graph(self) -> Callable[[], None]:
        """The model alone, replayed."""
        self.runner.forward(self._step)

        def run() -> None:
            with torch.inference_mode():
                self.runner._logits(self._step)

        return capture(run).replay


def models(rounds: int) -> list[Row]:
    """FLoRA r1 / LoRA r1 by gathered products; then the engine and its floor."""
    torch.manual_seed(0)
    peer = replace(
        kernel_arithmetic(), product=gathered_lora, look_up=index_module_group, epilogue=None,
        cost=ROW_MODE,
    )  # fmt: skip
    sides = {
        "flora": Decoding("flora", kernel_arithmetic()),
        "lora": Decoding("lora", kernel_arithmetic()),
        "gathered": Decoding("lora", peer),
        "base": Decoding(None, kernel_arithmetic()),
    }
    eager = in_turns({name: side.eager for name, side in sides.items()}, rounds)
    graphs = in_turns({name: side.graph() for name, side in sides.items()}, rounds)
    read = _read_seconds(sides["base"].runner, rounds)
    rows = []
    for way, times in (("eager", eager), ("graphs", graphs)):
        rows += [
            Row(
                f"decode throughput, FLoRA r1 / LoRA r1 by gathered bmm, {BATCH} adapters, {way}",
                ratios(times["gathered"], times["flora"]),
                3.0,
            ),
            Row(
                f"decode throughput, FLoRA r1 / base, {way}",
                ratios(times["base"], times["flora"]),
            ),
            Row(f"decode throughput, LoRA r1 / base, {way}", ratios(times["base"], times["lora"])),
        ]
    rows.append(
        Row(
            f"decode of {BATCH}, base, graph replay / time to read the weights",
            ratios(graphs["base"], read),
            1.5,
            "lower",
        )
    )
    del sides, graphs, eager
    torch.cuda.empty_cache()
    engine_s = _engine_step_seconds(rounds)
    rows.append(
        Row(
            f"decode of {BATCH}, FLoRA r1, whole engine / time to read the weights",
            ratios(engine_s, read),
            2.5,
            "lower",
        )
    )
    rows.append(
        Row("time to read the weights, ms", tuple(1e3 * second for second in read), None, "lower")
    )
    return rows


def training(rounds: int) -> list[Row]:
    """32 adapters trained together / one after another, through the trainer that jobs use."""
    from benchmarks.training import Sizes, measure

    with tempfile.TemporaryDirectory() as directory:
        _random_model().save_pretrained(directory)
        sizes = Sizes(
            adapters=(32,),
            tokens=(256,),
            bars={(32, 256): 4.0},
            rank_adapters=8,
            vocabulary=30_000,
            peft=False,  # which the GPU machine need not have
        )
        return measure(Path(directory), min(rounds, 3), sizes=sizes, dtype=DTYPE, device=DEVICE)


def _random_model() -> LlamaForCausalLM:
    with torch.device(DEVICE):
        return LlamaForCausalLM(ONE_BILLION).to(DTYPE).eval()


def _random_base() -> LoadedBase:
    model = _random_model().requires_grad_(False)
    model.generation_config.eos_token_id = None
    return LoadedBase(model, "0" * 64, Path("random weights"))


def _settings(*, decode_graphs: bool = True) -> EngineSettings:
    return EngineSettings(
        base="random weights",
        base_id="random",
        device="cuda",
        max_sequences=BATCH,
        max_sequence_tokens=1024,
        max_step_tokens=4096,
        bank_rows=64,
        bank_slots=BATCH,
        prefix_cache=False,
        decode_graphs=decode_graphs,
    )


def _bank(runner: NativeRunner, num_slots: int) -> AdapterBank:
    bank = AdapterBank(
        runner.shape.projections,
        num_rows=64,
        num_slots=num_slots,
        dtype=runner.dtype,
        device=runner.device,
        biases=runner.biases,
        base_weight=runner.base_weight,
    )
    runner.bind(bank)
    return bank


def _adapter(runner: NativeRunner, family: str) -> AdapterRows:
    def rows(num_in: int, num_out: int) -> ModuleRows:
        one, other = torch.randn(1, num_in), 0.05 * torch.randn(1, num_out)
        if family == "flora":
            return ModuleRows(mul_a_RO=other, mul_b_RI=one)
        return ModuleRows(add_q_EO=other, add_p_EI=0.05 * one)

    return AdapterRows({path: rows(*shape) for path, shape in runner.shape.projections.items()})


def _version(number: int) -> AdapterVersion:
    return AdapterVersion(f"{number:064x}")


def _load(bank: AdapterBank, runner: NativeRunner, family: str, count: int) -> list[int]:
    return [bank.load(_version(number), _adapter(runner, family)) for number in range(count)]


def _read_seconds(runner: NativeRunner, rounds: int) -> list[float]:
    """What reading every weight once would take at the rate of a large copy, which reads and writes."""
    projections = sum(layer.weight.nbytes for layer in runner._layers.layers.values())
    # The rest is what is not a projection: embedding, norms; a head of its own.
    num_bytes = projections + sum(weight.nbytes for weight in runner._model.parameters())
    source = torch.empty(1 << 30, dtype=torch.int32, device=DEVICE)
    target = torch.empty_like(source)
    taken = in_turns({"copy": lambda: target.copy_(source)}, rounds)["copy"]
    return [second * num_bytes / (2 * source.nbytes) for second in taken]


def _engine_step_seconds(rounds: int) -> list[float]:
    """Wall clock of a decode step of the whole engine, sampling and bookkeeping included, by round of 32 steps."""
    runner = NativeRunner(_random_base(), _settings())
    bank = _bank(runner, BATCH)
    loader = AdapterLoader(bank, _Nothing(), base_digest=runner.base_digest, concurrency=1)
    _load(bank, runner, "flora", BATCH)
    engine = Engine(runner, bank, loader, _settings())
    steps = 32
    length = (rounds + 1) * steps
    if length + CONTEXT > _settings().max_sequence_tokens:
        raise ValueError("too many rounds for the sequences' length")
    for number in range(BATCH):
        sampling = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
        prompt = tuple(torch.randint(3, 30_000, (CONTEXT,)).tolist())
        engine.submit(EngineRequest(str(number), prompt, sampling, AdapterSet.of(_version(number))))
    while len(engine.step().outputs) < BATCH:  # until all of them decode
        pass
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
        taken.append((time.perf_counter() - began) / steps)
    return taken


class _Nothing:
    """A source that is never asked."""

    def get(self, version: AdapterVersion) -> Any:
        raise KeyError(version)

    find_near = get
