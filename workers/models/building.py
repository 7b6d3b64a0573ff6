"""Which runner a base model gets."""

from __future__ import annotations

from workers.config import EngineSettings
from workers.models.hf import HfRunner
from workers.models.loading import LoadedBase
from workers.models.native.decoder import why_not_native
from workers.models.native.runner import NativeRunner


def build_runner(base: LoadedBase, settings: EngineSettings) -> HfRunner:
    """The runner the settings name; `auto` is the native one wherever it can be.

    Raises:
        InvalidRequestError: the model needs something the runner does not have; says what.
    """
    if settings.runner == "hf" or (settings.runner == "auto" and why_not_native(base.model)):
        return HfRunner(base, settings)
    return NativeRunner(base, settings)
