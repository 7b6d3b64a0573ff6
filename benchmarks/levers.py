"""What each thing done for speed on CPU brings: the same batch with and without it, all sides in one process.

The gains were predicted before the change was made, from the design's profile of an unfused decoder (matrix products
half of a step, attention a fifth, small operations a quarter, argmax 3 %) and from loops timed alone.

    python -m benchmarks.levers --base ~/.flora/bases/smollm2-135m-instruct
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from benchmarks.command import parse, parser_of
from benchmarks.own_engine import OwnEngine
from benchmarks.results_file import Lever, Row, own_side, print_rows, write_result
from benchmarks.unpatched import PlainLinear
from benchmarks.workload import Batch, Family, random_adapter
from storage.adapter_rows import AdapterRows
from storage.base_checkpoint import read_base_facts
from storage.identity import AdapterVersion, sha256_hex
from workers.config import EngineSettings
from workers.models.hf import HfRunner
from workers.models.native.runner import NativeRunner
from workers.row_form.adapted_product import adapted_product
from workers.row_form.base_linear import DenseLinear, serving_linear

CLAIM = "What was done for speed on CPU brings what it was done for."
SEED = 0
NUM_ADAPTERS = 16
LOADS: Mapping[str, tuple[Family, int] | None] = {
    "base": None,
    "16 FLoRA r1": ("flora", 1),
    "16 LoRA r8": ("lora", 8),
}


@dataclass(frozen=True, slots=True)
class Build:
    """One way to build the engine.

    `torch_rows`: adapters' rows by torch's operations, whatever else is compiled.
    """

    runner: str
    compiled: bool
    packed: bool
    torch_rows: bool = False


BUILDS = {
    "plain": Build("hf", compiled=False, packed=False),
    "packed": Build("hf", compiled=False, packed=True),
    "native": Build("native", compiled=False, packed=True),
    "torch rows": Build("native", compiled=True, packed=True, torch_rows=True),
    "all": Build("native", compiled=True, packed=True),
}


@dataclass(frozen=True, slots=True)
class Change:
    """From one build to another, under one load."""

    name: str
    before: str
    after: str
    load: str
    predicted: float


CHANGES = (
    Change("base weights packed for the matrix unit", "plain", "packed", "base", 1.3),
    Change("native decoder, q/k/v as one product", "packed", "native", "base", 1.1),
    Change("compiled loops: norms, rotary, silu, attention, argmax", "native", "all", "base", 1.5),
    Change("compiled loops: mul rows", "torch rows", "all", "16 FLoRA r1", 1.8),
    Change("compiled loops: add rows", "torch rows", "all", "16 LoRA r8", 1.8),
    Change("all of them", "plain", "all", "base", 2.0),
)


def build_engine(
    base: Path, build: Build, adapters: Mapping[AdapterVersion, AdapterRows]
) -> OwnEngine:
    """An engine for one batch at a time; `adapters` all fit its bank."""
    batch = Batch()
    side = OwnEngine.with_adapters(
        EngineSettings(
            base=str(base),
            runner=build.runner,  # type: ignore[arg-type]
            compiled=build.compiled,
            max_sequences=batch.requests,
            max_sequence_tokens=batch.prompt_tokens + batch.answer_tokens,
            bank_rows=sum(rows.max_rank for rows in adapters.values()),
            bank_slots=len(adapters),
        ),
        adapters,
    )
    runner = side.engine.runner
    if not isinstance(runner, HfRunner):
        raise TypeError(f"it is not known where {type(runner).__name__} keeps its layers")
    layers = runner._layers.layers.values()
    if not build.packed:
        for layer in layers:
            layer.base = DenseLinear(layer.weight, layer.base.bias_O)
    elif build.runner == "hf":
        # The native runner's head is packed; this one's is transformers' own.
        head = runner._model.get_output_embeddings()
        runner._model.set_output_embeddings(PlainLinear(serving_linear(head.weight)))
    if build.torch_rows and isinstance(runner, NativeRunner):
        for layer in layers:
            layer._context.product = adapted_product
        for block in runner._decoder._layers:
            block.query_key_value._epilogue = None
    return side


def measure(
    base: Path, rounds: int, batch: Batch | None = None
) -> dict[tuple[str, str], list[float]]:
    """Tokens per second of every (build, load), one per round; the builds take turns."""
    batch = batch or Batch()
    projections = read_base_facts(base, base.name).projections
    generator = torch.Generator().manual_seed(SEED)
    users: dict[str, list[AdapterVersion | None]] = {}
    adapters: dict[AdapterVersion, AdapterRows] = {}
    for load, kind in LOADS.items():
        versions: list[AdapterVersion | None] = [None]
        if kind is not None:
            versions = [
                AdapterVersion(sha256_hex(f"{load} {number}".encode()))
                for number in range(NUM_ADAPTERS)
            ]
            for version in versions:
                if version is not None:
                    adapters[version] = random_adapter(*kind, projections, generator)
        users[load] = [versions[number % len(versions)] for number in range(batch.requests)]
    sides = {name: build_engine(base, build, adapters) for name, build in BUILDS.items()}
    speed: dict[tuple[str, str], list[float]] = {}
    try:
        for side in sides.values():
            for load in LOADS:
                side.run(batch.prompts(-1), users[load], batch.warm_up_tokens)
        order = list(sides)
        for number in range(rounds):
            prompts = batch.prompts(SEED + number)
            for load in LOADS:
                for name in order:
                    answered = sides[name].run(prompts, users[load], batch.answer_tokens)
                    speed.setdefault((name, load), []).append(answered.tokens_per_s)
                order = [*order[1:], order[0]]
            print(f"round {number}", flush=True)
    finally:
        for side in sides.values():
            side.close()
    return speed


def gains(speed: Mapping[tuple[str, str], list[float]]) -> tuple[list[Row], list[Lever]]:
    """Every change's gain, as a row with its rounds and beside its prediction."""
    rows, levers = [], []
    for change in CHANGES:
        ratios = tuple(
            after / before
            for before, after in zip(
                speed[change.before, change.load], speed[change.after, change.load], strict=True
            )
        )
        rows.append(Row(f"{change.name} ({change.load})", ratios))
        levers.append(
            Lever(change.name, change.predicted, round(median(ratios), 3), f"load: {change.load}")
        )
    return rows, levers


def main() -> None:
    arguments = parse(parser_of(__doc__, rounds=3))
    rows, levers = gains(measure(arguments.base, arguments.rounds))
    print_rows(rows)
    path = write_result(
        "levers",
        CLAIM,
        rows,
        seed=SEED,
        workload=Batch().as_dict(),
        sides=[own_side(name) for name in BUILDS],
        levers=levers,
    )
    print("wrote", path.name)


if __name__ == "__main__":
    main()
