"""The peer's process: asked in its turn, stopped in ours, gone in the end. A stand-in takes vLLM's place in it."""

from __future__ import annotations

import json
import site
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.results_file import own_side
from benchmarks.vllm_process import VllmProcess

STAND_IN = '''
import types

__version__ = "0"


class SamplingParams:
    def __init__(self, *, max_tokens, temperature, ignore_eos, detokenize):
        assert temperature == 0.0 and ignore_eos
        self.max_tokens = max_tokens


class LLM:
    """Answers with a prompt's first token plus its adapter's number, again and again."""

    def __init__(self, base, **options):
        if base.endswith("broken"):
            raise ValueError("no such model")
        self.options = options
        print("words that are no answer")

    def collective_rpc(self, function):
        return [function(None)]

    def generate(self, prompts, sampling, lora_request, use_tqdm):
        adapters = lora_request or [None] * len(prompts)
        for prompt, adapter in zip(prompts, adapters, strict=True):
            number = 0 if adapter is None else adapter.number
            token = prompt["prompt_token_ids"][0] + number
            answer = types.SimpleNamespace(token_ids=[token] * sampling.max_tokens)
            yield types.SimpleNamespace(outputs=[answer])
'''
LORA_REQUEST = """
class LoRARequest:
    def __init__(self, name, number, path):
        self.number = number
"""


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An interpreter that finds the stand-in where vLLM would be."""
    package = tmp_path / "packages" / "vllm"
    (package / "lora").mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN)
    (package / "lora" / "__init__.py").touch()
    (package / "lora" / "request.py").write_text(LORA_REQUEST)
    paths = [str(package.parent), *site.getsitepackages()]
    monkeypatch.setenv("PYTHONPATH", ":".join(paths))
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libiomp5.so").touch()
    return python


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"r": 8}))
    return tmp_path / "adapter"


@pytest.fixture
def peer(python: Path, adapter: Path, tmp_path: Path) -> Iterator[VllmProcess]:
    peer = VllmProcess(python, tmp_path, {"one": adapter}, own_side("vLLM"), tmp_path / "log")
    yield peer
    peer.stop()


def test_it_answers_in_order_with_the_adapters_asked_for(peer: VllmProcess) -> None:
    side, versions = peer.ready()
    assert side.name == "vLLM"
    assert side.threads >= 1
    assert set(side.cpus) <= set(own_side("").cpus)
    assert versions["vllm"] == "0"
    answered = peer.run([[10, 1], [20, 1]], [None, "one"], 3)
    assert answered.answers == ((10, 10, 10), (21, 21, 21))
    assert answered.seconds > 0


def test_it_is_stopped_between_its_turns(peer: VllmProcess) -> None:
    peer.ready()
    for _ in range(2):
        assert {one.status() for one in peer._tree()} == {psutil.STATUS_STOPPED}
        peer.run([[1]], [None], 1)


def test_it_leaves_nothing_behind(peer: VllmProcess) -> None:
    peer.ready()
    tree = peer._tree()
    assert tree
    peer.stop()
    peer.stop()
    assert not any(one.is_running() for one in tree)


def test_a_peer_that_does_not_start_says_why(python: Path, tmp_path: Path) -> None:
    peer = VllmProcess(python, tmp_path / "broken", {}, own_side("vLLM"), tmp_path / "log")
    try:
        with pytest.raises(RuntimeError, match="no such model"):
            peer.ready()
    finally:
        peer.stop()
