"""Adapters published for benchmarks: who they are, and how popular."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.workload import Family, Zipf, random_adapter, spread_ranks
from storage.base_checkpoint import BaseFacts, read_base_facts
from storage.config import StorageSettings
from storage.formats.writing import write_flora, write_lora
from storage.identity import AdapterName, AdapterVersion
from storage.publishing import publish_adapter
from storage.registry import Registry
from storage.stores import open_store

_WRITERS = {"flora": write_flora, "lora": write_lora}


@dataclass(frozen=True, slots=True)
class Population:
    """Who is registered, who is resident, and what the engine of the registered ones may hold."""

    zipf: Zipf = Zipf(1000)  # noqa: RUF009 (frozen)
    resident: int = 32
    highest_rank: int = 16
    bank_rows: int = 1024
    bank_slots: int = 256

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "zipf": self.zipf.as_dict(),
            "ranks": f"1 to {self.highest_rank}, uniform",
        }


@dataclass(frozen=True, slots=True)
class Published:
    """The registered adapters of one family, the most popular first."""

    versions: tuple[AdapterVersion, ...]
    ranks: tuple[int, ...]


def publish_all(
    base: BaseFacts, directory: Path, family: Family, people: Population, *, seed: int
) -> Published:
    """Publish a family's adapters in the registry of `directory`, unless an earlier run did."""
    number = people.zipf.adapters
    ranks = spread_ranks(number, 1, people.highest_rank, seed)
    kind = f"{family}-{number}-{people.highest_rank}-{seed}-{base.digest[:12]}"
    record = directory / f"{kind}.json"
    if record.is_file():
        return Published(tuple(map(AdapterVersion, json.loads(record.read_text()))), tuple(ranks))
    registry = Registry(open_store(storage_in(directory, directory)))
    generator = torch.Generator().manual_seed(seed)
    versions = []
    for index, rank in enumerate(ranks):
        rows = random_adapter(
            family,
            rank,
            base.projections,
            generator,
            base_digest=base.digest,
            dtype=torch.bfloat16,
        )
        files = _WRITERS[family](rows, base.name)
        name = AdapterName("default", f"{family}-{index}")
        versions.append(publish_adapter(registry, name, files, base).version)
        if index % 100 == 99:
            print(f"published {index + 1} of {number} {family} adapters", flush=True)
    record.write_text(json.dumps(versions))
    return Published(tuple(versions), tuple(ranks))


def publish_on_all_cores(
    storage: StorageSettings, base: Path, names: Sequence[str], seed: int
) -> None:
    """Publish a FLoRA adapter of rank 1 under each name: tiny ones, where it matters how many there are."""
    pool = ProcessPoolExecutor(
        os.cpu_count(), get_context("spawn"), _Publisher.open, (storage, base, seed)
    )
    with pool:
        for done, _ in enumerate(pool.map(_publish_one, names, chunksize=10), start=1):
            if done % 100 == 0:
                print(f"published {done} of {len(names)} adapters", flush=True)


class _Publisher:
    """What a process of the pool publishes with."""

    registry: Registry
    base: BaseFacts
    seed: int

    @classmethod
    def open(cls, storage: StorageSettings, base: Path, seed: int) -> None:
        torch.set_num_threads(1)
        cls.registry = Registry(open_store(storage))
        cls.base = read_base_facts(base, base.name)
        cls.seed = seed


def _publish_one(name: str) -> None:
    base = _Publisher.base
    generator = torch.Generator().manual_seed(_Publisher.seed + zlib.crc32(name.encode()))
    rows = random_adapter(
        "flora", 1, base.projections, generator, base_digest=base.digest, dtype=torch.bfloat16
    )
    files = write_flora(rows, base.name)
    publish_adapter(_Publisher.registry, AdapterName("default", name), files, base)


def storage_in(directory: Path, cache_dir: Path) -> StorageSettings:
    """The registry of `directory`, behind a replica's cache of its own."""
    return StorageSettings(registry=str(directory / "registry"), cache_dir=cache_dir)
