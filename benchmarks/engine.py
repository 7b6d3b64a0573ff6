"""Our engine beside vLLM's CPU build, and what a batch of many adapters costs beside the same batch of the base model.

32 concurrent requests of 64 prompt and 64 answer tokens, greedy; 16 adapters with random rows on every projection, two
requests each. Sides take turns within every round, in another order each time, with other prompts each time, so a ratio
compares moments of the same machine. No HTTP, no Ray. vLLM runs only if it is given:

    python -m benchmarks.engine --base ~/.flora/bases/smollm2-135m-instruct [--vllm-python VENV/bin/python]

vLLM without adapters and vLLM with LoRA are two processes: with LoRA enabled it does not compile its model, which would
make its base slower. Both sides read the same PEFT directories. A run is void, and writes nothing, if the sides compute
with different threads or cores, if a side uses a core in the other's turn, or if vLLM's LoRA answers agree with ours
less than with its own base model's.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from benchmarks.command import add_runner, engine_settings, parse, parser_of
from benchmarks.own_engine import Answered, OwnEngine, first_token_agreement
from benchmarks.results_file import (
    Row,
    Side,
    VoidRunError,
    check_same_cores,
    own_side,
    print_rows,
    write_result,
)
from benchmarks.vllm_process import VllmProcess
from benchmarks.workload import Batch, Family, random_adapter
from storage.adapter_directory import write_directory
from storage.adapter_rows import AdapterRows
from storage.base_checkpoint import read_base_facts
from storage.formats.peft import read_peft
from storage.formats.writing import write_lora
from storage.identity import AdapterVersion, sha256_hex
from workers.config import EngineSettings

CLAIM = "A batch of 16 adapters costs little more than a batch of the base model, and our engine is the fastest on CPU."
SEED = 0
BASE = "base"
LORA = "16 LoRA r8"
# side → (family, rank, bar: its tokens per second / our own base's)
ADAPTED: dict[str, tuple[Family, int, float]] = {
    "16 FLoRA r1": ("flora", 1, 0.80),
    "16 FLoRA r4": ("flora", 4, 0.50),
    LORA: ("lora", 8, 0.75),
}
VLLM_BAR, VLLM_LORA_BAR = 1.0, 3.0
_MOST_IDLE_CORES = 0.1

T = TypeVar("T")

Run = Callable[[Sequence[Sequence[int]], int], Answered]


@dataclass(frozen=True)
class Measured:
    """All that a result says of one run."""

    rows: tuple[Row, ...]
    sides: tuple[Side, ...]
    versions: dict[str, str]


def measure(
    base: Path,
    rounds: int,
    *,
    batch: Batch | None = None,
    num_adapters: int = 16,
    settings: EngineSettings | None = None,
    vllm_python: Path | None = None,
) -> Measured:
    """Run `rounds` rounds of all sides.

    Args:
        base: a model directory.
        settings: of our engine, less the base and the sizes that follow from the batch.
        vllm_python: the interpreter of an environment with vLLM; None: our own sides only.

    Raises:
        VoidRunError: see the module's docstring.
    """
    batch = batch or Batch()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        facts = read_base_facts(base, base.name)
        adapters, of_side, lora_files = _adapters(facts.projections, num_adapters, directory)
        sides = [own_side("our engine")]
        versions: dict[str, str] = {}
        peers: list[VllmProcess] = []
        turns: dict[str, Run] = {}
        if vllm_python is not None:
            for name, files in ((BASE, {}), (LORA, lora_files)):
                peer = VllmProcess(
                    vllm_python,
                    base,
                    files,
                    replace(sides[0], name=f"vLLM, {name}"),
                    directory / f"vllm-{name}.log",
                )
                stack.callback(peer.stop)
                peers.append(peer)
                turns[f"vLLM, {name}"] = _peer_turn(peer, _spread(list(files) or [None], batch))
                side, versions = peer.ready()
                sides.append(side)
            check_same_cores(sides)
        engine = OwnEngine.with_adapters(
            (settings or EngineSettings()).model_copy(
                update={
                    "base": str(base),
                    "max_sequences": batch.requests,
                    "max_sequence_tokens": batch.prompt_tokens + batch.answer_tokens,
                    "bank_rows": sum(num_adapters * rank for _, rank, _ in ADAPTED.values()),
                    "bank_slots": num_adapters * len(ADAPTED),
                }
            ),
            adapters,
        )
        stack.callback(engine.close)
        for name, used in of_side.items():
            turns[name] = _own_turn(engine, _spread(used, batch))
        results, cores = _take_turns(turns, batch, rounds, peers)
        _check_adapters_are_used(results)
    return Measured((*_rows(results), *cores), tuple(sides), versions)


def _adapters(
    projections: dict[str, tuple[int, int]], count: int, directory: Path
) -> tuple[
    dict[AdapterVersion, AdapterRows],
    dict[str, list[AdapterVersion | None]],
    dict[str, Path],
]:
    """All rows by version, our sides with the versions each uses, and the LoRA adapters' directories by name."""
    generator = torch.Generator().manual_seed(SEED)
    adapters: dict[AdapterVersion, AdapterRows] = {}
    of_side: dict[str, list[AdapterVersion | None]] = {BASE: [None]}
    directories: dict[str, Path] = {}
    for side, (family, rank, _) in ADAPTED.items():
        of_side[side] = []
        for number in range(count):
            rows = random_adapter(family, rank, projections, generator)
            version = AdapterVersion(sha256_hex(f"{side} {number}".encode()))
            if side == LORA:
                files = write_lora(rows, "base")
                directories[f"lora-{number}"] = directory / f"lora-{number}"
                write_directory(directories[f"lora-{number}"], files)
                rows = read_peft(files).rows
            adapters[version] = rows
            of_side[side].append(version)
    return adapters, of_side, directories


def _spread(used: Sequence[T], batch: Batch) -> list[T]:
    """One entry for each request, in turn."""
    return [used[number % len(used)] for number in range(batch.requests)]


def _own_turn(engine: OwnEngine, versions: list[AdapterVersion | None]) -> Run:
    return lambda prompts, answer_tokens: engine.run(prompts, versions, answer_tokens)


def _peer_turn(peer: VllmProcess, names: list[str | None]) -> Run:
    return lambda prompts, answer_tokens: peer.run(prompts, names, answer_tokens)


def _take_turns(
    turns: dict[str, Run], batch: Batch, rounds: int, peers: Sequence[VllmProcess]
) -> tuple[dict[str, list[Answered]], list[Row]]:
    """The answers of every side, by round, and the cores each used in its turns."""
    names = list(turns)
    results: dict[str, list[Answered]] = {name: [] for name in names}
    cores: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        turns[name](batch.prompts(seed=-1), batch.warm_up_tokens)
    us = psutil.Process()
    for number in range(rounds):
        prompts = batch.prompts(seed=SEED + number)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            began, ours, theirs = time.perf_counter(), _cpu_seconds(us), _sum_cpu(peers)
            result = turns[name](prompts, batch.answer_tokens)
            wall = time.perf_counter() - began
            ours, theirs = _cpu_seconds(us) - ours, _sum_cpu(peers) - theirs
            busy, idle = (theirs, ours) if name.startswith("vLLM") else (ours, theirs)
            results[name].append(result)
            cores[name].append(busy / wall)
            print(
                f"round {number}  {name:<18} {result.tokens_per_s:7.1f} tokens/s   "
                f"{busy / wall:.2f} cores, the others {idle / wall:.2f}",
                flush=True,
            )
            if idle > _MOST_IDLE_CORES * wall:
                raise VoidRunError(f"in the turn of {name} the others used {idle / wall:.2f} cores")
    return results, [Row(f"{name}, cores used", tuple(used)) for name, used in cores.items()]


def _cpu_seconds(process: psutil.Process) -> float:
    return sum(process.cpu_times()[:2])


def _sum_cpu(peers: Sequence[VllmProcess]) -> float:
    return sum(peer.cpu_seconds() for peer in peers)


def _rows(results: dict[str, list[Answered]]) -> list[Row]:
    def ratio(side: str, other: str, bar: float | None, name: str) -> Row:
        pairs = zip(results[side], results[other], strict=True)
        return Row(name, tuple(a.tokens_per_s / b.tokens_per_s for a, b in pairs), bar)

    rows = []
    if f"vLLM, {BASE}" in results:
        rows += [
            ratio(BASE, f"vLLM, {BASE}", VLLM_BAR, "our engine, no adapters / vLLM, no adapters"),
            ratio(LORA, f"vLLM, {LORA}", VLLM_LORA_BAR, "our engine, 16 LoRA r8 / vLLM, the same"),
        ]
    rows += [
        ratio(side, BASE, bar, f"{side} / our own base") for side, (*_, bar) in ADAPTED.items()
    ]
    rows += [
        Row(f"{side}, tokens per second", tuple(one.tokens_per_s for one in answered))
        for side, answered in results.items()
    ]
    if f"vLLM, {BASE}" in results:
        rows += [
            Row(f"first tokens that vLLM answers as we do, {side}", (_agreement(results, side),))
            for side in (BASE, LORA)
        ]
    return rows


def _agreement(results: dict[str, list[Answered]], side: str) -> float:
    return first_token_agreement(results[f"vLLM, {side}"], results[side])


def _check_adapters_are_used(results: dict[str, list[Answered]]) -> None:
    """Raises VoidRunError when an engine seems to answer from the base, or vLLM from other adapters than ours."""
    for side in ADAPTED:
        if first_token_agreement(results[side], results[BASE]) == 1.0:
            raise VoidRunError(f"{side} answers as the base model does")
    if f"vLLM, {LORA}" in results:
        theirs = results[f"vLLM, {LORA}"]
        with_base = first_token_agreement(theirs, results[f"vLLM, {BASE}"])
        with_ours = first_token_agreement(theirs, results[LORA])
        if with_ours <= with_base:
            raise VoidRunError(
                f"vLLM's LoRA answers begin as its base's in {with_base:.0%}, as ours in {with_ours:.0%}"
            )


def main() -> None:
    parser = parser_of(__doc__, rounds=5)
    add_runner(parser)
    parser.add_argument("--vllm-python", type=Path, help="the interpreter of vLLM's environment")
    parser.add_argument("--requests", type=int, default=Batch().requests)
    parser.add_argument("--answer-tokens", type=int, default=Batch().answer_tokens)
    arguments = parse(parser)
    batch = Batch(requests=arguments.requests, answer_tokens=arguments.answer_tokens)
    measured = measure(
        arguments.base,
        arguments.rounds,
        batch=batch,
        settings=engine_settings(arguments),
        vllm_python=arguments.vllm_python,
    )
    print_rows(measured.rows)
    path = write_result(
        "engine",
        CLAIM,
        measured.rows,
        seed=SEED,
        workload={**batch.as_dict(), "runner": arguments.runner},
        sides=measured.sides,
        versions=measured.versions,
    )
    print("wrote", path.name)


if __name__ == "__main__":
    main()
