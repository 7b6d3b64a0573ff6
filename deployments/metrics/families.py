"""Every metric there is: its name, what it means, its labels. A figure of another name is not shown.

Label values are few: routes, status codes, tiers, stages, replicas that live, and the adapters that `TopAdapters` lets
have a name of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Family:
    """One metric. A counter's name ends in `_total`; a unit is part of the name."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


INGRESS = (
    Family(
        "flora_http_requests_total",
        "counter",
        "HTTP requests by status code of the response.",
        ("method", "route", "code"),
    ),
    Family(
        "flora_generations_total",
        "counter",
        "Answers asked of replicas; a request may want several.",
        ("adapter",),
    ),
    Family(
        "flora_generations_ended_total",
        "counter",
        "Answers by how they ended: stop, length, abort, gone (the client left), or an error's code.",
        ("reason",),
    ),
    Family("flora_generations", "gauge", "Answers under way by state.", ("state",)),
    Family("flora_prompt_tokens_total", "counter", "Prompt tokens, per answer.", ("adapter",)),
    Family("flora_answer_tokens_total", "counter", "Tokens answered.", ("adapter",)),
    Family(
        "flora_queue_seconds",
        "histogram",
        "From arrival at a replica to the first step, by where the adapter was found.",
        ("tier",),
    ),
    Family(
        "flora_first_token_seconds",
        "histogram",
        "From the ingress to the first token, by where the adapter was found.",
        ("tier",),
    ),
    Family(
        "flora_inter_token_seconds",
        "histogram",
        "Between tokens of an answer, as they reach the ingress.",
    ),
    Family(
        "vllm:lora_requests_info",
        "gauge",
        "Adapters of answers under way, as vLLM tells them; the value is when this was so.",
        ("running_lora_adapters", "waiting_lora_adapters", "max_lora"),
    ),
)

CLUSTER = (
    Family(
        "flora_placement_manager_up", "gauge", "1 while the placement manager answers the ingress."
    ),
    Family("flora_table_age_seconds", "gauge", "Since the placement table was last confirmed."),
    Family("flora_placement_epoch", "gauge", "Of the placement table."),
    Family(
        "flora_placement_moves_total",
        "counter",
        "Replicas that adapters were given to, and taken from, by the plan.",
        ("change",),
    ),
    Family("flora_placement_adapters", "gauge", "Adapter versions the plan gives to replicas."),
    Family(
        "flora_placement_unplaced_adapters",
        "gauge",
        "Adapter versions that are asked for and have no room by the plan.",
    ),
    Family(
        "flora_aliases_waiting", "gauge", "Aliases that do not yet serve the version they should."
    ),
    Family(
        "flora_versions_failed", "gauge", "Adapter versions no alias is moved to: they are broken."
    ),
    Family("flora_registry_up", "gauge", "1 while the placement manager can read the registry."),
    Family("flora_replicas", "gauge", "Replicas whose hearts beat."),
)

REPLICAS_TOGETHER = (
    Family("flora_engine_tokens_total", "counter", "Tokens that engines answered."),
    Family("flora_prefill_tokens_total", "counter", "Prompt tokens that engines computed."),
    Family(
        "flora_prefix_tokens_reused_total",
        "counter",
        "Prompt tokens found in the KV cache instead of computed.",
    ),
    Family("flora_step_seconds", "histogram", "What an engine's step takes."),
    Family("flora_step_sequences", "histogram", "Sequences in a step: the batch size."),
    Family("flora_step_rank_rows", "histogram", "Rank-weighted tokens in a step."),
    Family("flora_step_adapters", "histogram", "Distinct adapters in a step."),
    Family(
        "flora_engine_first_token_seconds", "histogram", "From a replica's engine to a first token."
    ),
    Family("flora_step_errors_total", "counter", "Steps that failed."),
    Family("flora_preemptions_total", "counter", "Sequences that gave their KV blocks back."),
    Family("flora_adapter_loads_total", "counter", "Adapters brought to a device."),
    Family("flora_adapter_load_errors_total", "counter", "Loads of adapters that failed."),
    Family(
        "flora_adapter_misses_total",
        "counter",
        "Requests that found their adapter not on the device.",
    ),
    Family(
        "flora_adapter_load_seconds",
        "histogram",
        "From asking for an adapter to its rows on the device, by where it was found.",
        ("tier",),
    ),
    Family(
        "flora_adapter_load_stage_seconds",
        "histogram",
        "Stages of loads: queue, registry, digest, parse, disk_read, disk_write, device.",
        ("stage",),
    ),
    Family("flora_adapter_evictions_total", "counter", "Adapters evicted from a device."),
    Family(
        "flora_step_load_wait_seconds_total",
        "counter",
        "How long steps have waited for loads of adapters.",
    ),
)
"""Of all replicas together, those that are gone included: they only grow while the ingress lives."""

REPLICAS_APART = (
    Family("flora_requests_running", "gauge", "Sequences that compute.", ("replica",)),
    Family("flora_requests_waiting", "gauge", "Sequences that wait.", ("replica",)),
    Family("flora_work_rank_tokens", "gauge", "Rank-weighted tokens to compute.", ("replica",)),
    Family("flora_kv_blocks_used", "gauge", "KV blocks held by sequences.", ("replica",)),
    Family("flora_kv_blocks", "gauge", "KV blocks there are.", ("replica",)),
    Family("flora_kv_slots_used", "gauge", "Sequences that hold a KV slot.", ("replica",)),
    Family("flora_kv_slots", "gauge", "Sequences that may run at once.", ("replica",)),
    Family("flora_bank_rows_used", "gauge", "Rows taken in the fullest projection.", ("replica",)),
    Family("flora_bank_rows", "gauge", "Rows the adapter bank has.", ("replica",)),
    Family("flora_bank_slots", "gauge", "Adapters the adapter bank has slots for.", ("replica",)),
    Family("flora_adapters_resident", "gauge", "Adapters by tier.", ("replica", "tier")),
    Family("flora_replica_failed_versions", "gauge", "Versions it cannot load.", ("replica",)),
    Family("flora_replica_registry_up", "gauge", "1 while it reads the registry.", ("replica",)),
    Family("flora_replica_threads", "gauge", "CPU threads of the model.", ("replica",)),
)
"""Of each live replica; its figures have all these labels but the first."""

TRAINING = (
    Family(
        "flora_training_jobs",
        "gauge",
        "Fine-tuning jobs of the API that did not end: validating_files, queued, running.",
        ("status",),
    ),
    Family(
        "flora_training_jobs_ended_total",
        "counter",
        "Fine-tuning jobs that ended: succeeded (its adapter is published), failed, cancelled.",
        ("status",),
    ),
    Family(
        "flora_training_tokens_total", "counter", "Tokens that jobs which succeeded trained on."
    ),
)
"""Told by the ingress that sees to jobs; the others tell 0, so their sum is right."""

FAMILIES = (*INGRESS, *CLUSTER, *TRAINING, *REPLICAS_TOGETHER, *REPLICAS_APART)
