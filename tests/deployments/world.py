"""A tiny world to serve: a registry on disk, adapters that really change answers, the engine alone as the oracle."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from deployments.settings import Settings
from storage.adapter_cache import AdapterCache
from storage.adapter_rows import AdapterRows, ModuleRows
from storage.base_checkpoint import BaseFacts, read_base_facts
from storage.config import StorageSettings
from storage.formats.writing import write_flora, write_lora
from storage.identity import DEFAULT_ALIAS, AdapterName, AdapterSet, AdapterVersion
from storage.publishing import publish_adapter
from storage.registry import Registry
from storage.stores import open_store
from training.config import TrainingSettings
from workers.config import EngineSettings
from workers.engine.building import build_engine
from workers.engine.request import EngineRequest, FinishReason, SamplingParams, StepOutputs
from workers.engine.thread_client import ThreadEngineClient

BASE_ID = "tiny-llama"


def settings_for(base_dir: Path, directory: Path, **serve: object) -> Settings:
    """float64, so that greedy answers do not depend on who else is in the batch."""
    return Settings(
        storage=StorageSettings(
            registry=str(directory / "registry"), cache_dir=directory / "cache"
        ),
        engine=EngineSettings(
            base=str(base_dir),
            base_id=BASE_ID,
            dtype="float64",
            max_sequences=8,
            max_sequence_tokens=512,
            max_step_tokens=64,
            bank_rows=8,
            bank_slots=8,
        ),
        serve={"allow_anonymous": True, "port": 0, **serve},
        training=TrainingSettings(storage_path=directory / "training", threads=1, batch_wait_s=1.0),
    )


@dataclass
class World:
    settings: Settings
    base: BaseFacts
    registry: Registry

    @classmethod
    def create(cls, base_dir: Path, settings: Settings) -> World:
        registry = Registry(open_store(settings.storage))
        return cls(settings, read_base_facts(base_dir, BASE_ID), registry)

    def publish(self, name: str, rank: int, seed: int, family: str = "flora") -> AdapterVersion:
        """A random adapter strong enough to change most tokens."""
        return self.publish_files(name, self.files(rank, seed, family))

    def publish_files(
        self, name: str, files: Mapping[str, bytes], alias: str | None = DEFAULT_ALIAS
    ) -> AdapterVersion:
        adapter = AdapterName("default", name)
        return publish_adapter(self.registry, adapter, files, self.base, alias=alias).version

    def files(self, rank: int, seed: int, family: str) -> dict[str, bytes]:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.7

        modules = {}
        for path, (num_in, num_out) in self.base.projections.items():
            if family == "lora":
                modules[path] = ModuleRows(
                    add_q_EO=random(rank, num_out), add_p_EI=random(rank, num_in)
                )
            else:
                modules[path] = ModuleRows(
                    mul_a_RO=random(rank, num_out), mul_b_RI=random(rank, num_in)
                )
        write = write_lora if family == "lora" else write_flora
        return write(AdapterRows(modules, self.base.digest), BASE_ID)


class LoneEngine:
    """One engine that answers one request at a time: what every answer of a server must equal."""

    def __init__(self, world: World) -> None:
        # Not the replicas' disk cache: what nobody asked them for must not be near them.
        own = world.settings.storage.cache_dir / "alone"
        cache = AdapterCache(
            world.registry, world.settings.storage.model_copy(update={"cache_dir": own})
        )
        roomy = world.settings.engine.model_copy(update={"bank_rows": 64, "bank_slots": 32})
        self.client = ThreadEngineClient(build_engine(roomy, cache))
        self._done = threading.Event()
        self._tokens: list[int] = []
        self._error: Exception | None = None
        self._count = 0
        self.client.start(self._on_step)

    def answer(
        self,
        prompt: Sequence[int],
        version: AdapterVersion | None,
        max_tokens: int,
        ignore_eos: bool = True,
    ) -> list[int]:
        """Greedy tokens."""
        self._count += 1
        self._done.clear()
        self._tokens = []
        self.client.submit(
            EngineRequest(
                f"alone-{self._count}",
                tuple(prompt),
                SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=ignore_eos),
                AdapterSet.of(version),
            )
        )
        assert self._done.wait(60)
        if self._error is not None:
            raise self._error
        return self._tokens

    def _on_step(self, outputs: StepOutputs) -> None:
        for output in outputs.outputs:
            self._tokens.extend(output.new_token_ids)
            self._error = output.error
            if output.finish_reason is not None:
                assert output.finish_reason is not FinishReason.ABORT
                self._done.set()
