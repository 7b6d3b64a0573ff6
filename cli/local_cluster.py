"""A private Ray on this machine: own ports, own short temporary directory, own token; stopped by its processes.

Knows nothing of FLoRA's application: `deployments.launching` deploys onto it.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil

from cli.interrupts import kept_handlers
from storage.errors import OverloadedError
from workers.large_pages import with_large_pages

# A Unix socket's path may have 107 bytes; Ray adds about 70 to its temporary directory.
_LONGEST_TEMP_PARENT = 20
_OBJECT_STORE_BYTES = 256 << 20
_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 2.0  # what has not ended by then is draining work nobody waits for
_PR_SET_PDEATHSIG = 1
_SOURCE_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class LocalCluster:
    """A handle on a running private Ray head. Plain data: another process may load it and stop the cluster.

    `created_s` is the head process's start time; with the pid it names the process for ever.
    """

    pid: int
    created_s: float
    address: str
    dashboard_url: str
    directory: str

    @property
    def token_file(self) -> Path:
        return Path(self.directory) / "token"

    @property
    def environment(self) -> dict[str, str]:
        """What a child process needs to find this cluster and to be let in: Ray, its job client, `ray job submit`."""
        return {
            "RAY_ADDRESS": self.address,
            "RAY_API_SERVER_ADDRESS": self.dashboard_url,
            **_authentication(self.token_file),
        }

    def is_alive(self) -> bool:
        return self._head() is not None

    def connect(self, namespace: str = "flora") -> None:
        """Make this process a driver of the cluster. Undone by `disconnect`."""
        self.authenticate()
        import ray

        # Ray lets SIGTERM end a driver, and a former one, on the spot; what they started would live on.
        with kept_handlers():
            ray.init(
                address=self.address,
                namespace=namespace,
                log_to_driver=False,
                logging_level="error",
            )

    def authenticate(self) -> None:
        """Let this process use the cluster's token, whatever Ray it spoke to before."""
        os.environ.update(_authentication(self.token_file))
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

        # Ray reads both once and keeps them; a second cluster in one process needs them read again.
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()

    @staticmethod
    def disconnect() -> None:
        import ray

        with kept_handlers():
            ray.shutdown()

    def stop(self) -> None:
        """End every process of the cluster and remove its directory. Returns when they are gone; may be repeated."""
        head = self._head()
        if head is not None:
            _end(head)
        shutil.rmtree(self.directory, ignore_errors=True)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def _head(self) -> psutil.Process | None:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.created_s) < 1.0 and _is_running(process):
                return process
        return None


def start_cluster(
    *,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    variables: Mapping[str, str] = MappingProxyType({}),
    outlives_caller: bool = False,
) -> LocalCluster:
    """Start a Ray head with a job server and a token of its own, and wait until it answers (about 10 s).

    Args:
        variables: of the environment of everything that will run on it.
        outlives_caller: go on after this process; else the head ends with it, however it ends (on Linux).
        num_cpus: logical CPUs Ray may hand out; by default enough for a few replicas, a trainer and their drivers.
        num_gpus: by default what Ray finds.

    Raises:
        OverloadedError: Ray did not start; the message has the end of its log.
    """
    directory = Path(tempfile.mkdtemp(prefix="flora-", dir=_short_temp_parent()))
    try:
        cpus = num_cpus or max(os.cpu_count() or 1, 8)
        return _start_in(directory, cpus, num_gpus, variables, outlives_caller)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def free_ports(count: int) -> list[int]:
    """Distinct TCP ports that nothing listens on at this moment."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("", 0))
        return [free.getsockname()[1] for free in sockets]


def _start_in(
    directory: Path,
    num_cpus: int,
    num_gpus: int | None,
    variables: Mapping[str, str],
    outlives_caller: bool,
) -> LocalCluster:
    token_file = directory / "token"
    token_file.touch(mode=0o600)
    token_file.write_text(secrets.token_hex(32))
    ray_dir = directory / "r"  # Ray opens its directory to everyone; ours, around it, stays closed
    dashboard, client, agent = free_ports(3)
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *("--node-ip-address", "127.0.0.1", "--port", "0", "--temp-dir", str(ray_dir)),
        *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)),
        *("--ray-client-server-port", str(client), "--dashboard-agent-listen-port", str(agent)),
        *("--num-cpus", str(num_cpus), "--object-store-memory", str(_OBJECT_STORE_BYTES)),
        *("--disable-usage-stats", "--log-color", "false"),
        *(() if num_gpus is None else ("--num-gpus", str(num_gpus))),
    ]
    log_file = directory / "head.log"
    with log_file.open("wb") as log:
        # A session of its own: Ctrl-C in the terminal is for the command, which then stops the head in order.
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=directory,
            env=with_large_pages({**_head_environment(token_file), **variables}),
            start_new_session=True,
            preexec_fn=None if outlives_caller or sys.platform != "linux" else _end_with_parent,
        )
    process = psutil.Process(child.pid)
    try:
        address = _wait_for_address(ray_dir / "ray_current_cluster", child, log_file)
    except BaseException:
        _end(process)
        raise
    return LocalCluster(
        pid=child.pid,
        created_s=process.create_time(),
        address=address,
        dashboard_url=f"http://127.0.0.1:{dashboard}",
        directory=str(directory),
    )


def _end_with_parent() -> None:
    """Runs in the head before it is Ray: let the kernel kill it when its parent is gone. Ray's daemons follow it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait_for_address(address_file: Path, child: subprocess.Popen[bytes], log_file: Path) -> str:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        address = address_file.read_text().strip() if address_file.exists() else ""
        if address:
            return address
        if child.poll() is not None:
            break
        time.sleep(0.1)
    tail = "\n".join(log_file.read_text(errors="replace").splitlines()[-15:])
    raise OverloadedError(f"the private Ray did not start; the end of its log:\n{tail}")


def _authentication(token_file: Path) -> dict[str, str]:
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}


def _head_environment(token_file: Path) -> dict[str, str]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_JOB_ID")
    }
    # Jobs run in a plain shell: `python` there must be this one, and it must find this checkout.
    scripts = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join([scripts, environment.get("PATH", os.defpath)])
    paths = [str(_SOURCE_ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    # Ray runs workers at a low priority by default; here they are the ones that answer.
    environment.setdefault("RAY_worker_niceness", "0")
    return {**environment, **_authentication(token_file)}


def _short_temp_parent() -> str:
    parent = tempfile.gettempdir()
    return parent if len(parent) <= _LONGEST_TEMP_PARENT else "/tmp"


def _end(head: psutil.Process) -> None:
    """Stop the head and all it started, politely and then not. All at once: a head asked first drains for 30 s."""
    sessions = {_session(process) for process in _tree(head)} - {None}
    for send in (psutil.Process.terminate, psutil.Process.kill, psutil.Process.kill):
        # Looked up anew each time: a raylet that saw a worker end may have started another.
        members = [process for process in psutil.process_iter() if _session(process) in sessions]
        for process in members:
            with suppress(psutil.NoSuchProcess):
                send(process)
        deadline_s = time.monotonic() + _STOP_TIMEOUT_S
        while any(map(_is_running, members)):
            if time.monotonic() > deadline_s:
                break
            time.sleep(0.05)
        else:
            break
    psutil.wait_procs([head], timeout=0)  # reaps it where it was this process's child


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _tree(head: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return [head, *head.children(recursive=True)]
    return []


def _session(process: psutil.Process) -> int | None:
    """Ray's daemons share the head's session; each job's driver leads one of its own."""
    try:
        return os.getsid(process.pid)
    except (ProcessLookupError, PermissionError):
        return None
