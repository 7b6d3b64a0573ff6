"""The same engine behind each transport, with faults to be switched on from outside, whatever process it is in."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from storage.errors import AdapterRefusedError
from storage.identity import AdapterVersion
from tests.workers.engine.small_engine import (
    Answer,
    Fetched,
    collect,
    projections,
    random_adapter,
    small_settings,
    version,
)
from workers.engine import engine as engine_module
from workers.engine.building import build_client
from workers.engine.client import EngineClient
from workers.engine.request import StepOutputs

WITHIN_S = 60.0
FAR = version(4)
REFUSED, BROKEN = version(7), version(8)  # one raises an error of ours, one an error of Python's


class Tiers:
    """Adapters 1, 2 and 3, FLoRA of rank 1, 2 and 3, on disk, and FAR, which is not; what was fetched once is on the
    host. The registry is away while its file among the faults exists.
    """

    def __init__(self, directory: Path, faults: Path | None = None) -> None:
        shapes = projections(directory)
        self.adapters = {version(i): random_adapter(shapes, "flora", i, seed=i) for i in (1, 2, 3)}
        self.adapters[FAR] = random_adapter(shapes, "flora", 1, seed=4)
        self._faults = faults
        self._host: set[AdapterVersion] = set()

    def find_near(self, wanted: AdapterVersion) -> Fetched | None:
        return self.get(wanted) if wanted in self._host else None

    def get(self, wanted: AdapterVersion) -> Fetched:
        if wanted == REFUSED:
            raise AdapterRefusedError("a tensor is too long", param="q_proj")
        self._host.add(wanted)
        return Fetched(self.adapters[wanted], "disk")

    def host_versions(self) -> frozenset[AdapterVersion]:
        return frozenset(self._host)

    def disk_versions(self) -> frozenset[AdapterVersion]:
        return frozenset({version(1), version(2), version(3)})

    def is_registry_up(self) -> bool:
        return self._faults is None or not (self._faults / "registry away").exists()


@dataclass(frozen=True)
class MakeTiers:
    """Picklable; in another process it installs the faults there as well."""

    directory: Path
    faults: Path  # a directory
    pid: int = field(default_factory=os.getpid)

    def __call__(self) -> Tiers:
        if os.getpid() != self.pid:
            install(self.faults, setattr)
        return Tiers(self.directory, self.faults)


@dataclass(frozen=True)
class Faults:
    """A fault is on while its file exists: `stuck` steps wait, `failing` models raise, a `broken` engine dies, the
    `registry away`.
    """

    directory: Path

    def begin(self, name: str) -> None:
        (self.directory / name).touch()

    def end(self, name: str) -> None:
        (self.directory / name).unlink(missing_ok=True)

    def end_all(self) -> None:
        for path in self.directory.iterdir():
            path.unlink()


def install(faults: Path, put: Callable[[object, str, object], None]) -> None:
    """Put the faults into the engine of this process."""
    step, build = engine_module.Engine.step, vars(engine_module)["build_step_input"]

    def faulty_step(self: engine_module.Engine) -> StepOutputs:
        while (faults / "stuck").exists():
            time.sleep(0.005)
        if (faults / "broken").exists():
            raise KeyError("a bug")
        return step(self)

    def faulty_build(*args: object) -> object:
        if (faults / "failing").exists():
            raise RuntimeError("the device is gone")
        return build(*args)

    put(engine_module.Engine, "step", faulty_step)
    put(engine_module, "build_step_input", faulty_build)


def open_client(transport: str, directory: Path, faults: Path) -> EngineClient:
    settings = small_settings(
        directory, bank_rows=4, max_sequences=3, transport=transport, step_timeout_s=2.0
    )
    return build_client(settings, MakeTiers(directory, faults))


@dataclass
class Inbox:
    """Collects answers from the engine's thread."""

    answers: dict[str, Answer] = field(default_factory=dict)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, step: StepOutputs) -> None:
        with self._changed:
            collect(self.answers, step.outputs)
            self._changed.notify_all()

    def wait(self, is_enough: Callable[[dict[str, Answer]], bool]) -> dict[str, Answer]:
        with self._changed:
            assert self._changed.wait_for(lambda: is_enough(self.answers), WITHIN_S), self.answers
            return dict(self.answers)

    def wait_for_ends(self, *names: str) -> dict[str, Answer]:
        return self.wait(
            lambda answers: all(name in answers and answers[name].is_over for name in names)
        )


def eventually(holds: Callable[[], bool]) -> None:
    end_s = time.monotonic() + WITHIN_S
    while not holds():
        assert time.monotonic() < end_s
        time.sleep(0.005)
