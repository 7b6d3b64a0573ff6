"""The handle on `benchmarks/vllm_peer.py`: starts it in vLLM's environment, asks it, and keeps it still between turns.

vLLM's worker polls shared memory while it waits, a fifth of a core here. So its processes are stopped (SIGSTOP) except
in their own turn: while we are measured they use nothing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks import vllm_peer
from benchmarks.own_engine import Answered
from benchmarks.results_file import Side

_KV_CACHE_GB = 2
_HALT_WITHIN_S = 10.0


class VllmProcess:
    """One vLLM engine in a process of its own. `ready` before anything else; `stop` in the end.

    Args:
        python: the interpreter of vLLM's environment.
        adapters: PEFT directories by name; none: an engine without LoRA, which is vLLM's faster one.
        side: what it shall compute with.
        log: where its own words go.
    """

    def __init__(
        self, python: Path, base: Path, adapters: Mapping[str, Path], side: Side, log: Path
    ) -> None:
        self._log = log
        with log.open("w") as words:
            self._process = subprocess.Popen(
                [str(python), vllm_peer.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=words,
                text=True,
                env=_environment(python, side),
                cwd=log.parent,
            )
        self._name = side.name
        self._tell(
            op="load",
            base=str(base),
            adapters={name: str(path) for name, path in adapters.items()},
            max_rank=max(map(_rank_of, adapters.values()), default=0),
        )

    def ready(self) -> tuple[Side, dict[str, str]]:
        """Wait until it is loaded, and leave it stopped; what it really computes with, and its versions.

        Raises:
            RuntimeError: it ended; the message has the end of its log.
        """
        loaded = self._hear()
        self._halt()
        return Side(self._name, loaded["threads"], tuple(loaded["cpus"])), loaded["versions"]

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        adapters: Sequence[str | None],
        answer_tokens: int,
    ) -> Answered:
        """As `OwnEngine.run`, adapters by name. The time is taken inside vLLM's process. Raises as `ready`."""
        with self._awake():
            self._tell(
                op="run",
                requests=list(zip(prompts, adapters, strict=True)),
                answer_tokens=answer_tokens,
            )
            result = self._hear()
        return Answered(result["seconds"], tuple(map(tuple, result["answers"])))

    def cpu_seconds(self) -> float:
        """Of all its processes since they began."""
        return sum(sum(one.cpu_times()[:2]) for one in self._tree())

    def stop(self) -> None:
        """End all its processes. May be repeated."""
        tree = self._tree()
        for one in tree:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(tree, timeout=10)
        self._process.wait()

    @contextmanager
    def _awake(self) -> Iterator[None]:
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._halt()

    def _halt(self) -> None:
        """Stop all processes, and wait until they are: a busy machine takes its time to tell them."""
        self._signal(signal.SIGSTOP)
        until_s = time.monotonic() + _HALT_WITHIN_S
        while any(_is_running(one) for one in self._tree()) and time.monotonic() < until_s:
            time.sleep(0.001)

    def _signal(self, number: signal.Signals) -> None:
        for one in self._tree():
            with suppress(psutil.NoSuchProcess):
                one.send_signal(number)

    def _tree(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            head = psutil.Process(self._process.pid)
            return [head, *head.children(recursive=True)]
        return []

    def _tell(self, **order: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def _hear(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(f"vLLM ended; the end of its log:\n{tail}")
        return json.loads(line)


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _rank_of(adapter: Path) -> int:
    rank: int = json.loads((adapter / "adapter_config.json").read_text())["r"]
    return rank


def _environment(python: Path, side: Side) -> dict[str, str]:
    """By default vLLM leaves one core to its scheduler; here it gets exactly the cores that we have.

    Raises:
        RuntimeError: the environment lacks Intel's OpenMP, without which vLLM's threads are not bound.
    """
    openmp = python.parent.parent / "lib" / "libiomp5.so"
    if not openmp.is_file():
        raise RuntimeError(f"there is no {openmp}: install intel-openmp beside vLLM")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    return {
        **kept,
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, side.cpus[: side.threads])),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(_KV_CACHE_GB),
        # The peer asks its worker for its threads by sending it a function.
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": str(openmp),
    }
