"""Put an engine together from settings: the one place that knows all its parts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from workers.bank.bank import AdapterBank
from workers.bank.loader import AdapterLoader
from workers.bank.source import AdapterSource, AdapterTiers
from workers.config import EngineSettings
from workers.engine.client import EngineClient
from workers.engine.engine import Engine
from workers.engine.process_client import ProcessEngineClient
from workers.engine.thread_client import ThreadEngineClient
from workers.models.building import build_runner
from workers.models.loading import LoadedBase, load_base
from workers.threads import computing_on, engine_threads

_log = logging.getLogger(__name__)


def build_engine(
    settings: EngineSettings, source: AdapterSource, *, base: LoadedBase | None = None
) -> Engine:
    """Load the base model and make an engine that fetches adapters from `source`.

    Args:
        base: the model, where it is loaded already; the engine takes it over.

    Raises:
        InvalidRequestError, StoreUnavailableError: the base model cannot be loaded or served; says why.
    """
    # What is measured at start must be measured on the threads that will step.
    with computing_on(engine_threads(settings.threads)):
        if base is None:
            base = load_base(settings.base, torch_dtype(settings), torch_device(settings))
        runner = build_runner(base, settings)
    settings = runner.settings
    _log.info("%s needs %s", settings.base_id, runner.memory)
    bank = AdapterBank(
        runner.shape.projections,
        num_rows=settings.bank_rows,
        num_slots=settings.bank_slots,
        dtype=runner.dtype,
        device=runner.device,
        biases=runner.biases,
        base_weight=runner.base_weight,
    )
    runner.bind(bank)
    loader = AdapterLoader(
        bank, source, base_digest=runner.base_digest, concurrency=settings.load_concurrency
    )
    return Engine(runner, bank, loader, settings)


def build_client(settings: EngineSettings, make_tiers: Callable[[], AdapterTiers]) -> EngineClient:
    """The engine behind the transport the settings name, its model loaded; not started.

    Args:
        make_tiers: opens the adapter cache, in the process the engine runs in; picklable for the process transport.

    Raises:
        FloraError: as `build_engine`, whichever process that happens in.
    """
    transport = settings.transport
    if transport == "auto":
        transport = "process" if torch_device(settings).type == "cuda" else "thread"
    if transport == "process":
        return ProcessEngineClient(settings, make_tiers)
    tiers = make_tiers()
    return ThreadEngineClient(build_engine_apart(settings, tiers), tiers)


def build_engine_apart(settings: EngineSettings, source: AdapterSource) -> Engine:
    """As `build_engine`, for an engine that another thread than this one will step.

    OpenMP keeps a team for every thread that ever computed, and once teams have more threads than there are cores
    they no longer wait for one another awake: measured, 423 tokens a second instead of 810. So nothing is computed in
    this thread, and the one that builds ends.
    """
    with ThreadPoolExecutor(max_workers=1) as builder:
        return builder.submit(build_engine, settings, source).result()


def torch_dtype(settings: EngineSettings) -> torch.dtype:
    return {
        "float64": torch.float64,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
    }[settings.dtype]


def torch_device(settings: EngineSettings) -> torch.device:
    if settings.device != "auto":
        return torch.device(settings.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
