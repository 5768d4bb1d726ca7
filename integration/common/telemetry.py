"""The metrics of an engine's process, shown by the engine's own server."""

from __future__ import annotations

import logging
from functools import cache

from ...config.sources import metrics_folder
from ...observability.prometheus import Telemetry
from .options import EngineOptions

__all__ = ["engine_telemetry"]

_logger = logging.getLogger(__name__)


def engine_telemetry(options: EngineOptions, is_first_rank: bool) -> Telemetry | None:
    """The series of this process, the same object at each call; None without metrics and on other ranks.

    Workers of an engine write their series to the folder in PROMETHEUS_MULTIPROC_DIR, its server reads them
    there. Reports are equal on all ranks, so the first rank alone shows them.
    """
    if not (options.metrics and is_first_rank):
        return None
    if metrics_folder() is None:
        _logger.warning(
            "eplb_plugin: metrics are enabled, but the engine was started without PROMETHEUS_MULTIPROC_DIR, "
            "so its /metrics cannot show them"
        )
    return _of_this_process()


@cache
def _of_this_process() -> Telemetry:
    from prometheus_client import REGISTRY

    return Telemetry(REGISTRY)
