"""A private Ray: nobody enters without its token, and nothing of it is left when it has been stopped."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from cli.local_cluster import LocalCluster, free_ports, start_cluster
from storage.errors import OverloadedError
from tests.conftest import NEEDS_RAY

pytestmark = NEEDS_RAY


def submit(cluster: LocalCluster, entrypoint: str) -> str:
    response = httpx.post(
        f"{cluster.dashboard_url}/api/jobs/",
        headers={"Authorization": f"Bearer {cluster.token_file.read_text()}"},
        json={"entrypoint": entrypoint},
    )
    return response.raise_for_status().json()["submission_id"]


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(path: Path) -> str:
    deadline_s = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return path.read_text().strip()


def test_without_the_token_nobody_enters(ray_session: LocalCluster) -> None:
    url = f"{ray_session.dashboard_url}/api/jobs/"
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, headers={"Authorization": "Bearer wrong"}).status_code in (401, 403)


def test_the_token_is_for_this_user_only(ray_session: LocalCluster) -> None:
    assert ray_session.token_file.stat().st_mode & 0o077 == 0
    assert Path(ray_session.directory).stat().st_mode & 0o077 == 0


def test_a_subprocess_joins_with_the_environment_alone(ray_session: LocalCluster) -> None:
    code = (
        "import ray; ray.init(logging_level='error'); print(ray.get_runtime_context().gcs_address)"
    )
    environment = {"PATH": "/usr/bin:/bin", **ray_session.environment}
    joined = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert joined.stdout.strip() == ray_session.address


def test_stopping_ends_daemons_jobs_and_files(tmp_path: Path) -> None:
    cluster = start_cluster()
    started = tmp_path / "pid"
    submit(cluster, f"echo $$ > {started} && exec sleep 600")
    job = psutil.Process(int(wait_for(started)))
    family = psutil.Process(cluster.pid).children(recursive=True)
    assert job in family

    cluster.stop()

    assert not cluster.is_alive()
    assert not Path(cluster.directory).exists()
    assert not any(map(is_running, [job, *family]))
    cluster.stop()  # again is no error


def test_killing_its_owner_ends_it_too() -> None:
    code = "from cli.local_cluster import start_cluster as s; print(s().pid, flush=True); input()"
    owner = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    head = psutil.Process(int(owner.stdout.readline()))
    directory = Path(head.cwd())
    daemons = [one for one in head.children() if one.name() in ("gcs_server", "raylet")]
    assert len(daemons) == 2
    owner.kill()
    owner.communicate()
    deadline_s = time.monotonic() + 30
    # Ray's two agents follow a minute later, when they miss the others.
    while any(map(is_running, [head, *daemons])) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert not any(map(is_running, [head, *daemons]))
    shutil.rmtree(directory)


def test_sigterm_stops_what_was_started(tmp_path: Path) -> None:
    code = """if True:
        import time
        from cli.interrupts import shielded, stop_on_signals
        from cli.local_cluster import start_cluster
        stop_on_signals()
        cluster = start_cluster()
        try:
            cluster.connect()
            cluster.disconnect()  # Ray takes the signal for itself, both times
            print(cluster.pid, flush=True)
            time.sleep(60)
        finally:
            with shielded():
                cluster.stop()
                print("stopped", flush=True)
    """
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    head = psutil.Process(int(owner.stdout.readline()))
    owner.terminate()
    assert owner.stdout.read().strip() == "stopped"
    owner.wait()
    assert not is_running(head)


def test_jobs_find_this_checkout_and_this_python(ray_session: LocalCluster, tmp_path: Path) -> None:
    found = tmp_path / "found"
    submit(
        ray_session,
        f'python -c \'import sys, storage, pathlib; pathlib.Path("{found}.new").write_text('
        f"sys.executable + chr(10) + storage.__file__)' && mv {found}.new {found}",
    )
    executable, module = wait_for(found).splitlines()
    assert Path(executable).samefile(sys.executable)
    assert Path(module).parent.parent == Path(__file__).resolve().parents[2]


def test_a_dead_head_is_known_as_dead(ray_session: LocalCluster) -> None:
    from dataclasses import replace

    assert ray_session.is_alive()
    reused = replace(ray_session, created_s=ray_session.created_s - 3600)
    assert not reused.is_alive(), "the same pid, but another process"


def test_a_ray_that_cannot_start_says_why_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("cli.local_cluster._LONGEST_TEMP_PARENT", 1000)
    monkeypatch.setenv("RAY_START_HOOK", "no_such_module.hook")
    with pytest.raises(OverloadedError, match="no_such_module"):
        start_cluster()
    assert list(tmp_path.iterdir()) == []


def test_free_ports_are_distinct_and_free() -> None:
    ports = free_ports(5)
    assert len(set(ports)) == 5
    for port in ports:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", port))
