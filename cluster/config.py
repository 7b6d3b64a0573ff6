"""Settings of placement and its heartbeat, and of the number of replicas."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


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
        default=0.9,
        gt=0,
        le=1,
        description="β: the part of a bank the plan may fill at most. It also leaves room for ten adapters of mean "
        "size, though never more than a quarter of the bank.",
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


class AutoscalingSettings(BaseModel):
    """When replicas are added and taken away, between `serve.min_replicas` and `serve.max_replicas`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    queue_s: float = Field(
        default=2.0,
        gt=0,
        description="Seconds of waiting work a replica may have before it is too much.",
    )
    kv_used: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="Part of a replica's sequences or KV blocks in use, at most.",
    )
    misses_per_s: float = Field(
        default=4.0,
        gt=0,
        description="Bank pressure: requests per second and replica whose adapter is not on the device, at most.",
    )
    first_token_s: float = Field(
        default=5.0, gt=0, description="The 99th percentile of the time to first token, at most."
    )
    shrink_below: float = Field(
        default=0.7,
        gt=0,
        lt=1,
        description="A replica leaves only if those that stay would be below this part of every target.",
    )
    up_delay_s: float = Field(default=3.0, ge=0, description="Too much for so long: more replicas.")
    down_delay_s: float = Field(
        default=120.0, ge=0, description="Little for so long: one replica fewer, and so on."
    )
    settle_s: float = Field(
        default=60.0,
        ge=0,
        description="So long after replicas came or went, misses and times to first token ask for none: they are of "
        "the last minute.",
    )
    report_s: float = Field(default=1.0, gt=0, le=10, description="How often replicas report.")
    stale_after_s: float = Field(
        default=10.0,
        gt=0,
        description="While a replica has not reported for so long, none is taken away.",
    )

    @model_validator(mode="after")
    def _reports_in_time(self) -> Self:
        if self.stale_after_s < 2 * self.report_s:
            raise ValueError("stale_after_s must be at least twice report_s")
        return self
