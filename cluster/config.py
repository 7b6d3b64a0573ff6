"""Settings of placement and its heartbeat."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class ClusterSettings(BaseModel):
    """How adapters are spread over replicas. Source of the defaults: simulation before the project began."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    heartbeat_s: float = Field(default=0.5, gt=0, le=10)
    missed_heartbeats: int = Field(
        default=3, ge=1, description="So many missed in a row, and a replica counts as dead."
    )
    tick_s: float = Field(default=3.0, gt=0, description="How often placement is recomputed.")
    registry_poll_s: float = Field(default=1.0, gt=0)
    demand_halflife_s: float = Field(default=120.0, gt=0)
    work_share_per_holder: float = Field(
        default=0.15,
        gt=0,
        le=1,
        description="φ: an adapter gets one more holder for each φ of a replica's fair share of work.",
    )
    pinned_fraction: float = Field(
        default=0.85, gt=0, le=1, description="β: the part of a bank the plan may fill."
    )
    load_slack: float = Field(
        default=1.05, ge=1, description="Bounded load: a holder may have this times the mean."
    )
    max_loads_per_tick: int = Field(default=64, ge=1)
    shrink_after_ticks: int = Field(default=10, ge=1)
    table_ttl_s: float = Field(
        default=30.0,
        gt=0,
        description="A table older than this is replaced by the registry's own word.",
    )
