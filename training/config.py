"""Settings of training jobs: where they run, and with what. What they learn is the specification's."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TrainingSettings(BaseModel):
    """Resources of training on this cluster."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: Literal["ray", "kubernetes"] = Field(
        default="ray",
        description="Jobs run on a Ray cluster that is up, or each as a RayJob object.",
    )
    job_address: str | None = Field(
        default=None, description="The Ray job address of another cluster; this one when unset."
    )
    kubernetes_template: Path = Field(
        default=Path("k8s/training.yaml"),
        description="The RayJob that every job's is made from; relative to the checkout.",
    )
    batch_wait_s: float = Field(
        default=5.0, ge=0, le=3600, description="How long a job of the API waits for company."
    )
    max_batch_adapters: int = Field(
        default=64, ge=1, le=1024, description="Jobs of the API in one training job."
    )
    max_running_batches: int = Field(
        default=2,
        ge=1,
        le=1024,
        description="Training jobs of the API at once, of one base; two, so that one can begin while the other "
        "trains, and that a job tried alone does not stop all others.",
    )
    max_attempts: int = Field(
        default=3,
        ge=1,
        le=100,
        description="How often a job of the API is started when its driver dies.",
    )
    batch_checkpoint_every_steps: int = Field(
        default=20,
        ge=1,
        description="Of training jobs made of jobs of the API; a cancelled one ends at its next checkpoint.",
    )
    max_file_bytes: int = Field(
        default=100 << 20, ge=1, le=1 << 30, description="Of one uploaded file of examples."
    )
    file_bytes_per_tenant: int = Field(
        default=10 << 30, ge=1, description="Of all uploaded files that a tenant has at once."
    )
    jobs_per_tenant: int = Field(
        default=100,
        ge=1,
        description="Jobs of the API that a tenant has at once, waiting or running, of one base.",
    )
    num_workers: int = Field(default=1, ge=1, le=1024)
    min_workers: int | None = Field(
        default=None,
        ge=1,
        description="Begin or go on with as few as this while the cluster's machines have no room for num_workers. Ray "
        "does not count what others than training hold of them. Unset: wait for all.",
    )
    look_for_room_s: float = Field(
        default=300.0,
        gt=0,
        description="With min_workers: how often Ray looks for room for more. Taking them in costs the steps since the "
        "last checkpoint.",
    )
    cpus_per_worker: float = Field(
        default=1.0, gt=0, description="What Ray sets aside; how many are used is `threads`."
    )
    gpus_per_worker: float = Field(default=0.0, ge=0)
    threads: int = Field(default=0, ge=0, description="CPU threads of a worker; 0: all cores.")
    max_step_tokens: int = Field(
        default=8192,
        ge=1,
        description="Tokens of one forward; a step with more runs in several, with the same gradient.",
    )
    memory_bytes: int = Field(
        default=0,
        ge=0,
        description="What a worker's training may take of its machine or GPU; 0: half of this machine's memory shared "
        "by the workers, or nine tenths of this machine's GPU. Decides how many adapters train at once.",
    )
    checkpoint_activations: Literal["auto"] | bool = Field(
        default="auto",
        description="Compute a layer's activations again in the backward rather than keep them: about a third slower, "
        "and takes far less memory. auto: where the adapters that fit otherwise would not fill a forward.",
    )
    max_failures: int = Field(
        default=3,
        ge=0,
        description="Lost workers are started again so often, from the last checkpoint.",
    )
    storage_path: Path = Field(
        default=Path("~/.flora/training"),
        description="Scratch of running jobs on each machine; what lasts of a job is in the registry's store.",
    )
