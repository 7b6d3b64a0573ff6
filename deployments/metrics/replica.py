"""An engine's load as figures: what a replica's heartbeat carries for whoever watches."""

from __future__ import annotations

from storage.figures import Figures
from workers.engine.client import EngineLoad


def replica_figures(load: EngineLoad) -> Figures:
    """All that `EngineLoad` tells; names and meanings are in `families.py`."""
    counters = {
        "flora_engine_tokens_total": load.tokens_out,
        "flora_prefix_tokens_reused_total": load.prefix_tokens_reused,
        "flora_step_errors_total": load.step_errors,
        "flora_preemptions_total": load.preemptions,
        "flora_adapter_loads_total": load.loads,
        "flora_adapter_load_errors_total": load.load_errors,
        "flora_adapter_misses_total": load.misses,
        "flora_adapter_evictions_total": load.evictions,
        "flora_step_load_wait_seconds_total": load.load_wait_s,
    }
    gauges = {
        "flora_requests_running": load.num_running,
        "flora_requests_waiting": load.num_waiting,
        "flora_work_rank_tokens": load.work,
        "flora_kv_blocks_used": load.kv_blocks_used,
        "flora_kv_blocks": load.kv_blocks,
        "flora_kv_slots_used": load.kv_slots_used,
        "flora_kv_slots": load.kv_slots,
        "flora_bank_rows_used": load.bank_rows_used,
        "flora_bank_rows": load.bank_rows,
        "flora_bank_slots": load.bank_slots,
        "flora_replica_failed_versions": len(load.failed),
        "flora_replica_registry_up": load.is_registry_up,
        "flora_replica_threads": load.threads,
    }
    by_tier = {"device": load.device, "host": load.host, "disk": load.disk}
    resident = {("flora_adapters_resident", (tier,)): len(held) for tier, held in by_tier.items()}
    told = Figures(
        {(name, ()): float(value) for name, value in counters.items()},
        {
            **{(name, ()): float(value) for name, value in gauges.items()},
            **{key: float(count) for key, count in resident.items()},
        },
    )
    return load.figures.merged(told)
