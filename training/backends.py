"""Which back end the settings name."""

from __future__ import annotations

from pathlib import Path

from training.backend import JobBackend
from training.job_settings import JobAreas, JobSettings

_CHECKOUT = Path(__file__).resolve().parent.parent


def runs_elsewhere(settings: JobAreas) -> bool:
    """Whether jobs of these settings run on another cluster than the one at hand."""
    return settings.training.backend == "kubernetes" or settings.training.job_address is not None


def open_backend(settings: JobAreas, here: str | None = None) -> JobBackend:
    """Where jobs of these settings run.

    Args:
        here: the job address of the Ray cluster that the caller is part of, or is about to use.

    Raises:
        SpecificationError: the template for Kubernetes cannot be used.
    """
    job_settings = JobSettings(storage=settings.storage, training=settings.training)
    if settings.training.backend == "kubernetes":
        from training.kubernetes_jobs import KubernetesJobBackend

        return KubernetesJobBackend(_CHECKOUT / settings.training.kubernetes_template, job_settings)
    # Whoever only asks for another back end needs no Ray.
    from training.ray_jobs import RayJobBackend

    if settings.training.job_address is not None:
        # Machines of another cluster need not have the code.
        return RayJobBackend(settings.training.job_address, job_settings, working_dir=_CHECKOUT)
    return RayJobBackend(here, job_settings)
