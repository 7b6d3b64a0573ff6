"""The cost of HTTP is measured on a real application, and on whole answers only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import serving
from benchmarks.http_client import post_all
from benchmarks.results_file import own_side
from benchmarks.workload import Batch
from cli.local_cluster import LocalCluster
from deployments.launching import deploy, undeploy
from workers.config import EngineSettings

SMALL = Batch(requests=3, prompt_tokens=6, answer_tokens=5, vocabulary=200)


def test_an_application_is_compared_with_the_same_engine_in_process(
    ray_session: LocalCluster, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    engine = EngineSettings(dtype="float32", max_step_tokens=64)
    settings = serving.sized(tiny_llama_dir, tmp_path, SMALL, engine)
    try:
        url = deploy(settings)
        rows = {row.name: row for row in serving.compare(url, settings, 2, SMALL)}
        replica = serving.replica_side(url, ray_session.pid)
        whole = serving.http_side(url, settings.engine.base_id, stream=False)
        with pytest.raises(RuntimeError, match="400"):
            whole([[10**6]], 5)  # no token of this model
        with pytest.raises(RuntimeError, match="404"):
            post_all(f"{url}/v1/nothing", [{}])
    finally:
        undeploy()
    assert rows["over HTTP, whole responses / the same engine in process"].bar == 0.85
    assert rows["over HTTP, streamed / the same engine in process"].bar == 0.70
    assert all(len(row.rounds) == 2 and row.value > 0 for row in rows.values())
    assert (replica.threads, replica.cpus) == (torch.get_num_threads(), own_side("").cpus)


@pytest.mark.parametrize(
    "text",
    [
        'data: {"usage": {"completion_tokens": 4}}\n\ndata: [DONE]\n',
        'data: {"usage": {"completion_tokens": 5}}\n',
    ],
)
def test_a_stream_that_is_short_or_cut_off_is_no_answer(text: str) -> None:
    serving._check('data: {"usage": {"completion_tokens": 5}}\n\ndata: [DONE]\n', True, 5)
    with pytest.raises(RuntimeError):
        serving._check(text, True, 5)
