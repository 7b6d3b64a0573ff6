"""What several packages' tests share: real parts, each started once. A part that cannot start fails its tests."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Before anything reads the environment: no test may reach a real bucket, and processes started here inherit this.
os.environ.update(
    AWS_ACCESS_KEY_ID="testing",
    AWS_SECRET_ACCESS_KEY="testing",
    AWS_DEFAULT_REGION="us-east-1",
    AWS_EC2_METADATA_DISABLED="true",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    TRITON_INTERPRET="1",  # kernels' numbers are checked without a GPU; read when triton is first imported
)
os.environ.pop("AWS_PROFILE", None)
os.environ.pop("AWS_SESSION_TOKEN", None)

import boto3
import hypothesis
import pytest
import torch

from cli.bases import find_base, pull_base
from cli.local_cluster import LocalCluster, start_cluster
from storage.config import StorageSettings
from tests.storage.s3_server import S3Server, s3_server

# A machine may be busy with other things: no example fails for being slow.
hypothesis.settings.register_profile("flora", deadline=None)
hypothesis.settings.load_profile("flora")

# One thread: the models here are tiny, and sums then have one order.
torch.set_num_threads(1)

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


NEEDS_RAY = pytest.mark.xdist_group("ray")
"""Of tests that start a Ray of their own."""


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """However many processes run the tests, those with a Ray stay in one: it starts once, and they are busy enough.

    They take longest, so they come first. The tests of any other file stay together too, with what they share.
    """
    for item in items:
        if isinstance(item, pytest.Function) and "ray_session" in item.fixturenames:
            item.add_marker(NEEDS_RAY)
        elif item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=lambda item: "ray" not in _groups(item))


def _groups(item: pytest.Item) -> set[str]:
    return {marker.args[0] for marker in item.iter_markers("xdist_group")}


@dataclass(frozen=True, slots=True)
class S3Endpoint:
    """A real S3 API over HTTP, with one empty bucket; credentials are in the environment."""

    url: str
    bucket: str


@pytest.fixture(scope="session")
def ray_session() -> Iterator[LocalCluster]:
    """A private Ray this process is a driver of. Subprocesses join it with `ray_session.environment`."""
    cluster = start_cluster()
    try:
        cluster.connect()
        yield cluster
    finally:
        cluster.disconnect()
        cluster.stop()


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct: $FLORA_TEST_BASE, or the one on this machine, or fetched as `flora base pull` does."""
    named = os.environ.get("FLORA_TEST_BASE")
    if named:
        directory = find_base(named)
        assert directory is not None, f"FLORA_TEST_BASE={named} is not a safetensors directory"
        return directory
    return pull_base()


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama (float32 values, any dtype may load them) with a trained byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [
            "the quick brown fox jumps over the lazy dog",
            "user assistant system",
            "a few small words",
        ],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=special,
    )
    fast.chat_template = _CHATML
    fast.save_pretrained(directory)

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(fast),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            # Wide, so that greedy answers differ from prompt to prompt instead of repeating one token.
            initializer_range=0.2,
            tie_word_embeddings=True,
            bos_token_id=fast.bos_token_id,
            eos_token_id=fast.eos_token_id,
            pad_token_id=fast.pad_token_id,
            dtype="float32",
        )
    )
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[S3Endpoint]:
    """moto's server: it enforces If-Match and If-None-Match, which the registry stands on."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # it logs every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = S3Endpoint(f"http://{host}:{port}", "flora")
        boto3.client("s3", endpoint_url=endpoint.url).create_bucket(Bucket=endpoint.bucket)
        yield endpoint
    finally:
        server.stop()


@pytest.fixture(scope="session")
def s3_api() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def s3_settings(s3_api: S3Server, monkeypatch: pytest.MonkeyPatch) -> StorageSettings:
    """Settings of a fresh, empty bucket."""
    bucket = f"bucket-{uuid.uuid4().hex}"
    client = boto3.client("s3", endpoint_url=s3_api.url, region_name="us-east-1")
    client.create_bucket(Bucket=bucket)
    monkeypatch.setattr(s3_api, "before", lambda method, path: None)  # undone with what a test set
    return StorageSettings(registry=f"s3://{bucket}/some/prefix", s3_endpoint_url=s3_api.url)


@pytest.fixture
def local_settings(tmp_path: Path) -> StorageSettings:
    return StorageSettings(registry=str(tmp_path / "registry"))
