"""What an adapter takes on every tier, beside the formula; and whether a busy engine grows.

State bytes of an adapter are Σ over projections of r·(I + O), and O more where there is a magnitude, in the type they
are kept in; IA3 keeps its one vector a projection. `file` counts the tensors in the published file; its header, which
names them, is told apart. `host` is what the cache holds, `device` the pages the bank gives away.

Growth is of the resident memory of a process that serves a tiny random model: every round asks for adapters drawn at
random from more than the bank holds, so rows are loaded and evicted all the time, prompts and answers of any length. It
is measured in float32, where only our own code could grow, and in bfloat16, where oneDNN keeps what it compiles.

    python -m benchmarks.memory --base ~/.flora/bases/smollm2-135m-instruct
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

import torch

from benchmarks.command import parse, parser_of
from benchmarks.own_engine import OwnEngine
from benchmarks.results_file import Row, print_rows, write_result
from benchmarks.workload import random_adapter
from storage.adapter_rows import AdapterRows, ModuleRows
from storage.base_checkpoint import read_base_facts
from storage.formats.peft import TENSORS_FILE, read_peft
from storage.formats.writing import write_flora, write_lora
from storage.identity import AdapterVersion, sha256_hex
from workers.bank.bank import AdapterBank
from workers.config import EngineSettings

CLAIM = "An adapter takes its rows and nothing more on every tier, and a busy engine does not grow."
SEED = 0
DTYPE = torch.bfloat16
GROWTH_BAR = 1.01  # the allocators' own unrest
WARM_UP_ROUNDS = 8
ADAPTERS, BANK_ROWS, MAX_RANK = 48, 48, 8
VERSION = AdapterVersion(sha256_hex(b"measured"))

Projections = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Kind:
    """A family at one rank."""

    family: str
    rank: int

    def __str__(self) -> str:
        return f"{self.family} r{self.rank}"

    def state_bytes(self, projections: Projections) -> int:
        """The formula."""
        if self.family == "IA3":
            return DTYPE.itemsize * sum(map(_ia3_side, projections, projections.values()))
        return DTYPE.itemsize * sum(
            self.rank * (num_in + num_out) + num_out * (self.family == "DoRA")
            for num_in, num_out in projections.values()
        )

    def rows(self, projections: Projections) -> AdapterRows:
        generator = torch.Generator().manual_seed(SEED)
        if self.family == "IA3":
            return AdapterRows({path: _ia3(path, *shape) for path, shape in projections.items()})
        rows = random_adapter(
            "flora" if self.family == "FLoRA" else "lora",
            self.rank,
            projections,
            generator,
            dtype=DTYPE,
            base_digest="0" * 64 if self.family == "FLoRA" else None,
        )
        if self.family != "DoRA":
            return rows
        return AdapterRows(
            {
                path: ModuleRows(
                    add_q_EO=one.add_q_EO,
                    add_p_EI=one.add_p_EI,
                    magnitude_O=torch.ones(projections[path][1], dtype=DTYPE),
                )
                for path, one in rows.modules.items()
            }
        )


KINDS = (Kind("FLoRA", 1), Kind("FLoRA", 4), Kind("LoRA", 8), Kind("DoRA", 8), Kind("IA3", 1))


def state_rows(projections: Projections) -> list[Row]:
    """Bytes on each tier / the formula's."""
    bank = AdapterBank(
        projections,
        num_rows=max(kind.rank for kind in KINDS) + 1,
        num_slots=1,
        dtype=DTYPE,
        device=torch.device("cpu"),
        base_weight=lambda path: torch.ones(projections[path][::-1]),
    )
    measured = []
    for kind in KINDS:
        rows, formula = kind.rows(projections), kind.state_bytes(projections)
        bank.load(VERSION, rows)
        if kind.family in ("FLoRA", "LoRA"):
            write = write_flora if kind.family == "FLoRA" else write_lora
            files = write(rows, "base")
            header = 8 + int.from_bytes(files[TENSORS_FILE][:8], "little")
            in_file = len(files[TENSORS_FILE]) - header
            rows = read_peft(files).rows
            measured += [
                _exactly(f"{kind}: file / formula", in_file / formula),
                Row(f"{kind}: header of the file / formula", (header / formula,)),
            ]
        measured += [
            _exactly(f"{kind}: host / formula", rows.num_bytes / formula),
            _exactly(f"{kind}: device / formula", _device_bytes(bank) / formula),
            Row(f"{kind}: state, KB", (formula / 1e3,)),
        ]
        bank.evict(VERSION)
    return measured


def growth_row(rounds: int, dtype: Literal["float32", "bfloat16"]) -> Row:
    """Resident memory after each round / after the warm-up. Leaves nothing behind but what it measures."""
    random = Random(SEED)
    generator = torch.Generator().manual_seed(SEED)
    with tempfile.TemporaryDirectory() as directory:
        settings = EngineSettings(
            base=directory,
            device="cpu",
            dtype=dtype,
            max_sequence_tokens=128,
            bank_rows=BANK_ROWS,
            bank_slots=16,
        )
        _save_tiny_model(Path(directory))
        projections = read_base_facts(Path(directory)).projections
        adapters = {
            AdapterVersion(sha256_hex(f"{i}".encode())): random_adapter(
                random.choice(("flora", "lora")),
                random.randint(1, MAX_RANK),
                projections,
                generator,
                dtype=DTYPE,
            )
            for i in range(ADAPTERS)
        }
        engine = OwnEngine.with_adapters(settings, adapters)
        resident: list[int] = []
        for _ in range(WARM_UP_ROUNDS + rounds):
            prompts = [
                [random.randrange(3, 500) for _ in range(random.randint(1, 64))] for _ in range(32)
            ]
            wanted = [random.choice([None, *adapters]) for _ in prompts]
            engine.run(prompts, wanted, answer_tokens=random.randint(1, 32))
            gc.collect()
            resident.append(_resident_bytes())
        engine.close()
    after_warm_up = resident[WARM_UP_ROUNDS - 1]
    ratios = tuple(one / after_warm_up for one in resident[WARM_UP_ROUNDS:])
    return Row(f"{dtype}: resident memory / after warm-up", ratios, GROWTH_BAR, "lower")


def _exactly(name: str, ratio: float) -> Row:
    return Row(name, (ratio,), bar=1.0, better="lower")


def _device_bytes(bank: AdapterBank) -> int:
    """Of the pages that are the adapter's own."""
    return sum(
        len(pages.in_pages) * bank.modules[path].in_rows_NI[0].nbytes
        + len(pages.out_pages) * bank.modules[path].out_rows_NO[0].nbytes
        for path, pages in bank.pages_of(VERSION).items()
    )


def _ia3_side(path: str, shape: tuple[int, int]) -> int:
    """IA3's vector: on the input of the second MLP projection, on the output of keys and values; no other."""
    if path.endswith("down_proj"):
        return shape[0]
    return shape[1] if path.endswith(("k_proj", "v_proj")) else 0


def _ia3(path: str, num_in: int, num_out: int) -> ModuleRows:
    """As its reader makes it."""
    vector = torch.ones(_ia3_side(path, (num_in, num_out)), dtype=DTYPE)
    if not vector.numel():
        return ModuleRows()
    if path.endswith("down_proj"):
        return ModuleRows(mul_b_RI=vector[None] - 1)
    return ModuleRows(scale_O=vector, bias_scale_O=vector)


def _resident_bytes() -> int:
    """Of this process, as Linux counts them."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _save_tiny_model(directory: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
        )
    ).save_pretrained(directory)


def main() -> None:
    arguments = parse(parser_of(__doc__, rounds=20))
    projections = read_base_facts(arguments.base).projections
    rows = state_rows(projections)
    # float32 first: what oneDNN keeps for bfloat16 it keeps for good.
    rows += [growth_row(arguments.rounds, dtype) for dtype in ("float32", "bfloat16")]
    print_rows(rows)
    workload = {
        "model of the growth": "random Llama, 2 layers of 64",
        "adapters": ADAPTERS,
        "bank_rows": BANK_ROWS,
        "requests a round": 32,
        "warm-up rounds": WARM_UP_ROUNDS,
    }
    print("wrote", write_result("memory", CLAIM, rows, seed=SEED, workload=workload).name)


if __name__ == "__main__":
    main()
