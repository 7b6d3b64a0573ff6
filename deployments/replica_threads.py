"""How many CPU threads a replica computes on, beside the other replicas of its machine. No Ray."""

from __future__ import annotations

from deployments.settings import Settings


def replica_threads(settings: Settings, *, usable_cpus: int, node_cpus: float) -> int:
    """`engine.threads`, or this machine's CPUs divided by the replicas that can be on it; at least 1.

    Args:
        usable_cpus: what this process may really use.
        node_cpus: what Ray hands out on this machine, which is more on a laptop where replicas and training take turns.
    """
    if settings.engine.threads:
        return settings.engine.threads
    serve = settings.serve
    that_fit = max(1, int(node_cpus / serve.cpus_per_replica))
    return max(1, usable_cpus // min(serve.max_replicas, that_fit))
