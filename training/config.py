"""Settings of training jobs: where they run, and with what. What they learn is the specification's."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class TrainingSettings(BaseModel):
    """Resources of training on this cluster."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job_address: str | None = Field(
        default=None, description="The Ray job address of another cluster; this one when unset."
    )
    num_workers: int = Field(default=1, ge=1, le=1024)
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
    max_failures: int = Field(
        default=3,
        ge=0,
        description="Lost workers are started again so often, from the last checkpoint.",
    )
    storage_path: Path = Field(
        default=Path("~/.flora/training"), description="Checkpoints and events of jobs."
    )
