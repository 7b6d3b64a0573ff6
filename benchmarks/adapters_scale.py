"""A thousand registered adapters, drawn by Zipf's law, beside 32 adapters that never leave the device.

32 requests at a time, the next one coming when one is answered; 64 prompt and 64 answer tokens, greedy. The thousand
lie in a real registry on this machine's disk and reach the bank as they do in a replica: `AdapterCache`, then the
loader's threads, while others' requests run. Request i has the same prompt and an adapter of the same rank on both
sides, so the sides compute the same products; only how many adapters they are drawn from differs. Ranks are 1 to 16,
each as often as any other; FLoRA and LoRA are measured apart.

    python -m benchmarks.adapters_scale --base ~/.flora/bases/smollm2-135m-instruct --directory DIR [--prepare]

DIR keeps the published adapters for the next run (bf16, about 5 MB each). `--prepare` publishes and ends. The
registry's files may be in the system's page cache; the replica's own cache directory is new in every run.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import add_runner, engine_settings, parse, parser_of
from benchmarks.own_engine import OwnEngine
from benchmarks.population import Population, Published, publish_all, storage_in
from benchmarks.results_file import Row, own_side, print_rows, write_result
from benchmarks.workload import Batch, Family, Zipf, random_adapter, spread_ranks
from storage.adapter_cache import AdapterCache
from storage.base_checkpoint import BaseFacts, read_base_facts
from storage.identity import AdapterVersion, sha256_hex
from storage.registry import Registry
from storage.stores import open_store
from workers.config import EngineSettings
from workers.engine.building import build_engine

CLAIM = (
    "A thousand registered adapters are served nearly as fast as 32 that never leave the device."
)
SEED = 0
BAR = 0.90
WAIT_BAR_MS = 0.5  # 0 ms, to the nearest; a lock that is taken at once is not waited for
FAMILIES: tuple[Family, ...] = ("flora", "lora")
_LOADED_WITHIN_S = 300.0


def measure(
    base: Path,
    directory: Path,
    rounds: int,
    *,
    batch: Batch | None = None,
    concurrency: int = 32,
    people: Population | None = None,
    settings: EngineSettings | None = None,
) -> list[Row]:
    """All rows of both families.

    Args:
        directory: where published adapters are, or will be.
        batch: of a round: `requests` in all, `concurrency` at a time.
        settings: of the engines, less the base and the sizes that follow from the rest.
    """
    batch, people = batch or Batch(requests=64), people or Population()
    facts = read_base_facts(base, base.name)
    sized = (settings or EngineSettings()).model_copy(
        update={
            "base": str(base),
            "max_sequences": concurrency,
            "max_sequence_tokens": batch.prompt_tokens + batch.answer_tokens,
            "bank_rows": people.bank_rows,
            "bank_slots": people.bank_slots,
        }
    )
    rows: list[Row] = []
    for family in FAMILIES:
        published = publish_all(facts, directory, family, people, seed=SEED)
        rows += _measure_family(
            facts, directory, family, published, rounds, batch, concurrency, people, sized
        )
    return rows


def _measure_family(
    base: BaseFacts,
    directory: Path,
    family: Family,
    published: Published,
    rounds: int,
    batch: Batch,
    concurrency: int,
    people: Population,
    settings: EngineSettings,
) -> list[Row]:
    resident_ranks = spread_ranks(people.resident, 1, people.highest_rank, SEED)
    resident = _resident(base, family, resident_ranks)
    with ExitStack() as stack:
        few = OwnEngine.with_adapters(settings, resident)
        stack.callback(few.close)
        cache_dir = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        storage = storage_in(directory, cache_dir)
        cache = AdapterCache(Registry(open_store(storage)), storage)
        many = OwnEngine(build_engine(settings, cache.get))
        stack.callback(many.close)
        _bring(few, list(resident))
        _bring(many, _that_fit(published, settings.bank_rows))
        ratios, near, loads, waits = [], [], [], []
        for number in range(-1, rounds):  # the first one warms up
            drawn = people.zipf.draw(batch.requests, SEED + number + 1)
            ranks = [published.ranks[index] for index in drawn]
            registered = [published.versions[index] for index in drawn]
            sides = [(few, _of_ranks(ranks, resident_ranks, list(resident))), (many, registered)]
            before = many.engine.load()
            speed = {}
            for side, versions in sides if number % 2 else reversed(sides):
                answered = side.run(
                    batch.prompts(SEED + number + 1),
                    versions,
                    batch.warm_up_tokens if number < 0 else batch.answer_tokens,
                    concurrency,
                )
                speed[side] = answered.tokens_per_s
            if number < 0:
                continue
            ratios.append(speed[many] / speed[few])
            near.append(many.tiers["device"] / batch.requests)
            after = many.engine.load()
            loads.append(float(after.loads - before.loads))
            waits.append(1000 * (after.load_wait_s - before.load_wait_s))
            print(
                f"round {number}  {family:<5}  registered {speed[many]:7.1f} tokens/s, resident "
                f"{speed[few]:7.1f}; {loads[-1]:.0f} loads, {dict(many.tiers)}",
                flush=True,
            )
    name = {"flora": "FLoRA", "lora": "LoRA"}[family]
    return [
        Row(
            f"{people.zipf.adapters:,} registered {name} adapters / {people.resident} resident",
            tuple(ratios),
            BAR,
        ),
        Row(
            f"{name}: ms that the step thread waits for loads in a round",
            tuple(waits),
            WAIT_BAR_MS,
            "lower",
        ),
        Row(f"{name}: requests whose adapter was on the device", tuple(near)),
        Row(f"{name}: adapters loaded in a round", tuple(loads)),
    ]


def _resident(base: BaseFacts, family: Family, ranks: Sequence[int]) -> dict[AdapterVersion, Any]:
    generator = torch.Generator().manual_seed(SEED + 1)
    return {
        AdapterVersion(sha256_hex(f"resident {family} {index}".encode())): random_adapter(
            family, rank, base.projections, generator, dtype=torch.bfloat16
        )
        for index, rank in enumerate(ranks)
    }


def _of_ranks(
    ranks: Sequence[int], resident_ranks: Sequence[int], resident: Sequence[AdapterVersion]
) -> list[AdapterVersion]:
    """For each rank a resident adapter that has it, those of one rank in turn."""
    of_rank: dict[int, list[AdapterVersion]] = {}
    for version, rank in zip(resident, resident_ranks, strict=True):
        of_rank.setdefault(rank, []).append(version)
    turns = {rank: count() for rank in of_rank}
    return [of_rank[rank][next(turns[rank]) % len(of_rank[rank])] for rank in ranks]


def _that_fit(published: Published, bank_rows: int) -> list[AdapterVersion]:
    """The most popular adapters a bank holds together: where a replica stands after some time."""
    left, fitting = bank_rows, []
    for version, rank in zip(published.versions, published.ranks, strict=True):
        left -= rank
        if left < 0:
            break
        fitting.append(version)
    return fitting


def _bring(side: OwnEngine, versions: Sequence[AdapterVersion]) -> None:
    """Have them loaded before anything is measured. Raises TimeoutError when a load fails or hangs."""
    side.engine.prefetch(versions, pinned=frozenset())
    until_s = time.monotonic() + _LOADED_WITHIN_S
    while not set(versions) <= set(side.engine.bank.residents()):
        if time.monotonic() > until_s:
            raise TimeoutError("the adapters did not come to the bank")
        time.sleep(0.01)


def main() -> None:
    parser = parser_of(__doc__, rounds=3)
    add_runner(parser)
    parser.add_argument("--directory", type=Path, required=True, help="keeps published adapters")
    parser.add_argument("--prepare", action="store_true", help="publish the adapters, and end")
    parser.add_argument("--requests", type=int, default=64, help="of a round")
    parser.add_argument("--answer-tokens", type=int, default=Batch().answer_tokens)
    parser.add_argument("--adapters", type=int, default=1000)
    arguments = parse(parser)
    base, directory = arguments.base, arguments.directory.expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    people = replace(Population(), zipf=Zipf(arguments.adapters))
    if arguments.prepare:
        for family in FAMILIES:
            publish_all(read_base_facts(base, base.name), directory, family, people, seed=SEED)
        return
    batch = Batch(requests=arguments.requests, answer_tokens=arguments.answer_tokens)
    rows = measure(
        base,
        directory,
        arguments.rounds,
        batch=batch,
        people=people,
        settings=engine_settings(arguments),
    )
    print_rows(rows)
    path = write_result(
        "adapters_scale",
        CLAIM,
        rows,
        seed=SEED,
        workload={
            **batch.as_dict(),
            "concurrency": 32,
            "runner": arguments.runner,
            **people.as_dict(),
        },
        sides=[own_side("registered"), own_side("resident")],
    )
    print("wrote", path.name)


if __name__ == "__main__":
    main()
