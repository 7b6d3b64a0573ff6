"""What only an engine in its own process shows: processes that die, and what crosses between them."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from storage.errors import FloraError, InvalidRequestError, OverloadedError, StoreUnavailableError
from tests.workers.engine.small_engine import greedy, prompt, small_settings, version
from tests.workers.engine.transports import (
    Faults,
    Inbox,
    MakeTiers,
    Tiers,
    eventually,
    open_client,
)
from workers.engine import process_client
from workers.engine.process_client import ProcessEngineClient
from workers.engine.request import FinishReason

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def inbox() -> Inbox:
    return Inbox()


@pytest.fixture
def client(tiny_llama_dir: Path, tmp_path: Path, inbox: Inbox) -> Iterator[ProcessEngineClient]:
    one = open_client("process", tiny_llama_dir, tmp_path)
    assert isinstance(one, ProcessEngineClient)
    one.start(inbox)
    yield one
    Faults(tmp_path).end_all()
    one.stop()


def test_a_killed_engine_ends_every_request_once(client: ProcessEngineClient, inbox: Inbox) -> None:
    names = [f"r{number}" for number in range(6)]
    for number, name in enumerate(names):
        client.submit(greedy(name, prompt(number, 4), version(1 + number % 3), max_tokens=60))
    inbox.wait(lambda answers: bool(answers))
    os.kill(client.pid, signal.SIGKILL)
    answers = inbox.wait_for_ends(*names)
    assert FinishReason.ERROR in {one.reason for one in answers.values()}
    assert all(
        one.reason is FinishReason.LENGTH or isinstance(one.error, FloraError)
        for one in answers.values()
    )
    eventually(lambda: not client.is_alive())
    with pytest.raises(OverloadedError):
        client.submit(greedy("late", prompt(0, 4)))
    client.stop()
    assert inbox.answers.keys() == set(names)


def test_an_engine_that_says_nothing_is_stuck(client: ProcessEngineClient) -> None:
    assert client.is_alive()
    os.kill(client.pid, signal.SIGSTOP)
    try:
        eventually(lambda: not client.is_alive())
    finally:
        os.kill(client.pid, signal.SIGCONT)
    eventually(client.is_alive)


def test_a_step_that_never_ends_does_not_keep_stop_from_ending(
    client: ProcessEngineClient,
    inbox: Inbox,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process_client, "STOP_WITHIN_S", 0.5)
    Faults(tmp_path).begin("stuck")
    client.submit(greedy("r", prompt(0, 4)))
    client.stop()
    assert inbox.wait_for_ends("r")["r"].reason is FinishReason.ERROR
    assert not psutil.pid_exists(client.pid)


def test_an_interrupt_of_the_terminal_is_left_to_who_started_the_engine(
    client: ProcessEngineClient, inbox: Inbox
) -> None:
    os.kill(client.pid, signal.SIGINT)
    client.submit(greedy("r", prompt(0, 4)))
    assert inbox.wait_for_ends("r")["r"].reason is FinishReason.LENGTH


def test_no_engine_outlives_the_process_that_started_it(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    script = textwrap.dedent(f"""
        import time
        from pathlib import Path
        from tests.workers.engine.transports import open_client
        client = open_client("process", Path({str(tiny_llama_dir)!r}), Path({str(tmp_path)!r}))
        client.start(print)
        print(client.pid, flush=True)
        time.sleep(600)
    """)
    parent = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert parent.stdout is not None
        engine = psutil.Process(int(parent.stdout.readline()))
    finally:
        parent.kill()
        parent.wait()
    psutil.wait_procs([engine], timeout=60)
    assert not engine.is_running()


@dataclass(frozen=True)
class Raise:
    """Tiers that cannot be opened."""

    error: Exception

    def __call__(self) -> Tiers:
        raise self.error


@dataclass(frozen=True)
class Exit:
    def __call__(self) -> Tiers:
        os._exit(7)


def test_what_keeps_an_engine_from_starting_is_raised_here(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequestError, match="there is no model at") as refused:
        ProcessEngineClient(small_settings(tmp_path / "none"), MakeTiers(tiny_llama_dir, tmp_path))
    assert refused.value.param == "engine.base"
    settings = small_settings(tiny_llama_dir)
    with pytest.raises(StoreUnavailableError, match="no bucket"):
        ProcessEngineClient(settings, Raise(StoreUnavailableError("no bucket")))
    with pytest.raises(FloraError, match="cannot start: KeyError"):
        ProcessEngineClient(settings, Raise(KeyError("a bug")))
    with pytest.raises(FloraError, match="ended while starting, with 7"):
        ProcessEngineClient(settings, Exit())


@dataclass(frozen=True)
class Talk:
    """Says something in every way a process can."""

    directory: Path

    def __call__(self) -> Tiers:
        print("on stdout", flush=True)
        logging.getLogger("storage.somewhere").warning("in the log")
        logging.getLogger("storage.somewhere").debug("not wanted")
        return Tiers(self.directory)


def test_what_the_engine_says_is_heard_where_we_are_heard(
    tiny_llama_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    client = ProcessEngineClient(small_settings(tiny_llama_dir), Talk(tiny_llama_dir))
    assert client.load().bank_rows == 64, "what it can hold is known from the start"
    client.stop()
    heard = capfd.readouterr()
    assert "on stdout" in heard.out
    assert f"WARNING storage.somewhere (engine {client.pid}): in the log" in heard.err
    assert "not wanted" not in heard.err
