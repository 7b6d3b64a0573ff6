"""What training made is what the registry gives back."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from storage.adapter_directory import write_directory
from storage.base_checkpoint import BaseFacts
from storage.errors import AdapterRefusedError, AliasTakenError
from storage.formats.peft import read_peft
from storage.identity import AdapterName
from storage.local_store import LocalObjectStore
from storage.object_store import ObjectStore
from storage.publishing import publish_adapter
from storage.registry import Registry
from tests.storage.passing_store import InterruptingStore
from tests.training.tiny_jobs import (
    adapter,
    largest_difference,
    padded_loss,
    run_of,
    tiny_base,
    tiny_model,
    trained,
)
from training.checkpoints import Checkpoints
from training.publishing import JobPublisher, peft_files
from training.spec import AdapterSpec


@pytest.fixture
def store(tmp_path: Path) -> LocalObjectStore:
    return LocalObjectStore(tmp_path / "store")


@pytest.fixture
def registry(store: LocalObjectStore) -> Registry:
    return Registry(store)


@pytest.fixture(scope="module")
def base() -> BaseFacts:
    return BaseFacts("a" * 64, "tiny", tiny_base().layers.projections)


@pytest.fixture
def publish(store: LocalObjectStore, registry: Registry, base: BaseFacts) -> JobPublisher:
    return publisher_of("job-1", store, registry, base)


def publisher_of(
    job_id: str, store: LocalObjectStore, registry: Registry, base: BaseFacts
) -> JobPublisher:
    checkpoints = Checkpoints(store, job_id)
    checkpoints.join(checkpoints.begin("d"))
    return JobPublisher(
        registry,
        base,
        checkpoints,
        tenant="default",
        job_id=job_id,
        max_bytes=1 << 20,
    )


SPECS = [
    adapter("flora", rank=3, rank_pattern={"q_proj": 1}, steps=8),
    adapter("paper", rank=2, offset=0, steps=8, alias="prod"),
    adapter("lora", family="lora", rank=4, target_modules=["v_proj"], alpha=3, steps=8),
    adapter("rslora", family="rslora", rank=4, rank_pattern={"v_proj": 2}, steps=8),
    adapter("dora", family="dora", rank=2, alpha=3, steps=8),
    adapter("ia3", family="ia3", target_modules=["v_proj", "down_proj"], steps=8),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_published_adapter_reads_back_as_it_was_trained(
    registry: Registry, publish: JobPublisher, base: BaseFacts, spec: AdapterSpec
) -> None:
    rows = trained(spec).published[spec.name]
    version = publish(spec, rows)

    name = AdapterName("default", spec.name)
    assert registry.resolve(name, spec.alias) == version
    manifest = registry.manifest(name, version)
    assert manifest.provenance.source == "training:job-1"
    assert manifest.content.family == spec.family
    assert manifest.content.base_digest == base.digest
    assert manifest.provenance.warnings == ()
    files = {path: registry.read_file(entry) for path, entry in manifest.content.files.items()}
    back = read_peft(files).rows
    # An IA3 file holds l where training holds l − 1.
    assert largest_difference(rows, back) <= (2**-23 if spec.family == "ia3" else 0.0)
    for path, module in rows.modules.items():
        assert back.modules[path].offset == module.offset
        assert back.modules[path].add_gate == pytest.approx(module.add_gate, rel=1e-12)
    assert publish(spec, rows) == version, "publishing again is the same version"


def test_weights_nobody_may_serve_are_refused(registry: Registry, publish: JobPublisher) -> None:
    spec = adapter("wild", steps=1)
    rows = trained(spec).published["wild"]
    for module in rows.modules.values():
        assert module.mul_a_RO is not None
        module.mul_a_RO[0, 0] = 2e4
    with pytest.raises(AdapterRefusedError):
        publish(spec, rows)
    assert list(registry.list("default")) == []
    assert publish.again(spec) is None


def test_a_job_publishes_an_adapter_as_one_thing_whatever_its_attempts_come_out_as(
    store: LocalObjectStore, registry: Registry, publish: JobPublisher, base: BaseFacts
) -> None:
    spec = adapter("once", steps=1)
    first, other = (
        trained(spec.model_copy(update={"steps": steps})).published["once"] for steps in (1, 2)
    )
    assert publish.again(spec) is None, "nothing was about to be published"
    version = publish(spec, first)
    assert publish(spec, other) == version
    assert publish.again(spec) == version
    assert len(list(registry.versions(AdapterName("default", "once")))) == 1
    another_job = publisher_of("job-2", store, registry, base)
    assert another_job(spec, other) != version


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_peft_loads_what_was_trained_and_loses_as_much(
    spec: AdapterSpec, base: BaseFacts, tmp_path: Path
) -> None:
    """PEFT's loss with the published adapter is the trainer's own loss of the step that would have come next."""
    faster = spec.model_copy(update={"learning_rate": 2e-2})
    rows = trained(faster).published[spec.name]
    write_directory(tmp_path / "adapter", peft_files(spec, rows, base.name))
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    one_more = faster.model_copy(update={"steps": 9})
    run = run_of(one_more)
    batch = [run.draw() for _ in range(9)][-1]
    expected = trained(one_more).losses(spec.name)[-1]
    with torch.no_grad():
        assert padded_loss(model, batch).item() == pytest.approx(expected, abs=1e-5)
        assert padded_loss(tiny_model(), batch).item() > expected + 1e-2, "the twin without it"


def test_an_adapter_that_somebody_made_meanwhile_keeps_its_place_and_no_weights_are_lost(
    store: LocalObjectStore, registry: Registry, publish: JobPublisher, base: BaseFacts
) -> None:
    spec = adapter("mine", steps=1, may_replace=False)
    theirs, ours = (
        trained(spec.model_copy(update={"steps": steps})).published["mine"] for steps in (1, 2)
    )
    name = AdapterName("default", "mine")
    admins = publisher_of("job-2", store, registry, base)
    first = admins(spec, theirs)
    assert admins(spec, theirs) == first, "what it published itself is in nobody's way"
    with pytest.raises(AliasTakenError, match="made by somebody else meanwhile") as refused:
        publish(spec, ours)
    assert registry.resolve(name) == first
    (kept,) = {manifest.version for manifest in registry.versions(name)} - {first}
    assert f"mine@{kept[:12]}" in refused.value.message
    assert f"flora adapters alias mine latest {kept[:12]}" in refused.value.message
    assert registry.resolve(name, kept[:12]) == kept, "its weights answer by their digest"
    with pytest.raises(AliasTakenError):
        publish(spec.model_copy(update={"alias": "prod"}), ours)
    assert set(registry.aliases(name)) == {"latest"}
    assert publish(spec.model_copy(update={"may_replace": True}), ours) == kept
    assert registry.resolve(name) == kept


def test_of_two_that_make_one_adapter_at_the_same_moment_one_has_it(
    local: ObjectStore, base: BaseFacts
) -> None:
    """Whatever one of them is doing when the other does all of it."""
    spec = adapter("mine", steps=1, may_replace=False)
    rows = [trained(spec.model_copy(update={"steps": steps})).published["mine"] for steps in (1, 2)]
    files = [peft_files(spec, one, "tiny") for one in rows]

    def make(store: ObjectStore, number: int, name: AdapterName) -> str:
        made = publish_adapter(Registry(store), name, files[number], base, may_replace=False)
        return made.version

    for at in range(40):
        name = AdapterName("default", f"mine-{at}")
        first = InterruptingStore(local, at, partial(made_first, make, local, name))
        winner = None
        with suppress(AliasTakenError):
            winner = make(first, 0, name)
        if not first.has_happened:
            break
        versions = {manifest.version for manifest in Registry(local).versions(name)}
        assert len(versions) == 2, "both are kept"
        meant = Registry(local).resolve(name)
        assert winner in (None, meant)
    assert at >= 3


def made_first(make: Any, store: ObjectStore, name: AdapterName) -> None:
    with suppress(AliasTakenError):
        make(store, 1, name)
