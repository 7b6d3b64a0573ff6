"""`flora doctor`: is this machine ready, and if not, what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import psutil
import typer

from cli.bases import list_bases
from cli.console import AsJson, err, format_bytes, out, print_json
from cli.errors import EXIT_FAILED
from cli.home import flora_home
from cli.running import find_running
from cli.settings import RegistryOption, S3Endpoint, storage_settings
from storage.config import StorageSettings
from storage.errors import FloraError
from storage.stores import open_store

_LEAST_MEMORY = 4 << 30
_LEAST_DISK = 2 << 30


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `fix` says what to do; a finding with `ok` None is good to know and nothing to repair."""

    name: str
    ok: bool | None
    found: str
    fix: str = ""


def doctor(
    registry: RegistryOption = None, s3_endpoint: S3Endpoint = None, as_json: AsJson = False
) -> None:
    """Check this machine and the registry, and say what to fix. Exit code 1 when something must be.

    Example: [bold]flora doctor --registry s3://bucket/flora --s3-endpoint http://127.0.0.1:9000[/]
    """
    with err.status("looking around"):
        checks = list(_checks(storage_settings(registry, s3_endpoint)))
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        for check in checks:
            mark = {True: "[green]ok[/]  ", False: "[red]fix[/] ", None: "[dim]note[/]"}[check.ok]
            out.print(f"{mark}  {check.name:<10} {check.found}", soft_wrap=True)
            if check.fix:
                out.print(f"                 [bold]→ {check.fix}[/]", soft_wrap=True)
    if any(check.ok is False for check in checks):
        raise typer.Exit(EXIT_FAILED)


def _checks(storage: StorageSettings) -> Iterator[Check]:
    looks: tuple[Callable[[], Check], ...] = (
        _python,
        _packages,
        _processors,
        _memory,
        _disk,
        _accelerator,
        _compiler,
        _base,
        lambda: _registry(storage),
        _cluster,
    )
    for look in looks:
        yield look()


def _python() -> Check:
    found = f"{platform.python_version()} at {sys.executable}"
    ok = sys.version_info >= (3, 11)
    return Check("python", ok, found, "" if ok else "use Python 3.11 or newer")


def _packages() -> Check:
    names = ("ray", "torch", "transformers")
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return Check("packages", True, found)


def _processors() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Check("cores", True, f"{cores} ({platform.machine()})")


def _memory() -> Check:
    memory = psutil.virtual_memory()
    found = f"{format_bytes(memory.available)} free of {format_bytes(memory.total)}"
    ok = memory.available >= _LEAST_MEMORY
    fix = f"close something: a small model needs {format_bytes(_LEAST_MEMORY)} free"
    return Check("memory", ok, found, "" if ok else fix)


def _disk() -> Check:
    home = flora_home()
    existing = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    ok = free >= _LEAST_DISK and os.access(existing, os.W_OK)
    fix = f"free some space or set FLORA_HOME elsewhere ({format_bytes(_LEAST_DISK)} are needed)"
    return Check("disk", ok, f"{format_bytes(free)} free for {home}", "" if ok else fix)


def _accelerator() -> Check:
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        found = f"{torch.cuda.device_count()} × {device.name}, {format_bytes(device.total_memory)}"
        return Check("gpu", True, found)
    if shutil.which("nvidia-smi"):
        fix = "install the torch build for this driver: its own site says which"
        return Check("gpu", False, "there is one, but this torch cannot use it", fix)
    return Check("gpu", None, "none; everything runs on the CPU")


def _compiler() -> Check:
    """Loops for the CPU are compiled with it at first use; a GPU's kernels need it too."""
    from workers.compiled.library import compiled_loops

    if compiled_loops() is not None:
        return Check("compiler", True, "loops are compiled")
    fix = "install a C++ compiler (g++ or clang++): without one engines work, slower"
    return Check("compiler", None, "loops cannot be compiled", fix)


def _base() -> Check:
    bases = list_bases()
    if bases:
        return Check("base", True, ", ".join(base.name for base in bases))
    return Check("base", False, "no base model here", "flora base pull")


def _registry(storage: StorageSettings) -> Check:
    place = storage.registry
    if storage.s3_endpoint_url is not None:
        place += f" at {storage.s3_endpoint_url}"
    try:
        open_store(storage)
    except FloraError as error:
        fix = "check the address and credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
        return Check("registry", False, f"{place}: {error.message}", fix)
    return Check("registry", True, f"{place}, conditional writes hold")


def _cluster() -> Check:
    running = find_running()
    if running is None:
        return Check("cluster", None, "none running here (flora up)")
    return Check("cluster", None, running.url or "starting")
