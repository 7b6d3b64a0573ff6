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
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

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
        resident_ranks = spread_ranks(people.resident, 1, people.highest_rank, SEED)
        with ExitStack() as stack:
            few = _Resident(facts, family, resident_ranks, sized)
            stack.callback(few.engine.close)
            cache_dir = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            storage = storage_in(directory, cache_dir)
            cache = AdapterCache(Registry(open_store(storage)), storage)
            many = OwnEngine(build_engine(sized, cache))
            stack.callback(many.close)
            _bring(few.engine, few.versions)
            _bring(many, _that_fit(published, people.bank_rows))
            taken = [
                _round(number, few, many, published, people, batch, concurrency)
                for number in range(-1, rounds)  # the first one warms up
            ]
        rows += _rows({"flora": "FLoRA", "lora": "LoRA"}[family], people, taken[1:])
    return rows


@dataclass(frozen=True, slots=True)
class _Round:
    """One turn of both sides; the last three are of the registered adapters' side."""

    ratio: float
    on_device: float
    loads: int
    wait_ms: float


class _Resident:
    """The engine whose few adapters stay, and which of them have which rank."""

    def __init__(
        self, base: BaseFacts, family: Family, ranks: Sequence[int], settings: EngineSettings
    ) -> None:
        generator = torch.Generator().manual_seed(SEED + 1)
        adapters = {
            AdapterVersion(sha256_hex(f"resident {family} {index}".encode())): random_adapter(
                family, rank, base.projections, generator, dtype=torch.bfloat16
            )
            for index, rank in enumerate(ranks)
        }
        self.engine = OwnEngine.with_adapters(settings, adapters)
        self.versions = list(adapters)
        self._ranks = tuple(ranks)

    def of_ranks(self, ranks: Sequence[int]) -> list[AdapterVersion]:
        return _of_ranks(ranks, self._ranks, self.versions)


def _round(
    number: int,
    few: _Resident,
    many: OwnEngine,
    published: Published,
    people: Population,
    batch: Batch,
    concurrency: int,
) -> _Round:
    drawn = people.zipf.draw(batch.requests, SEED + number + 1)
    prompts = batch.prompts(SEED + number + 1)
    answer_tokens = batch.warm_up_tokens if number < 0 else batch.answer_tokens
    sides = [
        (few.engine, few.of_ranks([published.ranks[index] for index in drawn])),
        (many, [published.versions[index] for index in drawn]),
    ]
    before = many.engine.load()
    speed = {
        side: side.run(prompts, versions, answer_tokens, concurrency).tokens_per_s
        for side, versions in (sides if number % 2 else reversed(sides))
    }
    after = many.engine.load()
    taken = _Round(
        ratio=speed[many] / speed[few.engine],
        on_device=many.tiers["device"] / batch.requests,
        loads=after.loads - before.loads,
        wait_ms=1000 * (after.load_wait_s - before.load_wait_s),
    )
    print(
        f"round {number}  registered {speed[many]:7.1f} tokens/s, resident {speed[few.engine]:7.1f}; "
        f"{taken.loads} loads, {dict(many.tiers)}",
        flush=True,
    )
    return taken


def _rows(name: str, people: Population, taken: Sequence[_Round]) -> list[Row]:
    return [
        Row(
            f"{people.zipf.adapters:,} registered {name} adapters / {people.resident} resident",
            tuple(one.ratio for one in taken),
            BAR,
        ),
        Row(
            f"{name}: ms that the step thread waits for loads in a round",
            tuple(one.wait_ms for one in taken),
            WAIT_BAR_MS,
            "lower",
        ),
        Row(
            f"{name}: requests whose adapter was on the device",
            tuple(one.on_device for one in taken),
        ),
        Row(f"{name}: adapters loaded in a round", tuple(float(one.loads) for one in taken)),
    ]


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
