"""The series of a process within an engine: in the registry that the engine's own `/metrics` shows."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache

import torch

from ...config.environment import metrics_folder
from ...observability.prometheus import Telemetry
from .options import EngineOptions

__all__ = ["bytes_of_one_expert", "engine_telemetry"]

_logger = logging.getLogger(__name__)


def engine_telemetry(options: EngineOptions, is_first_rank: bool) -> Telemetry | None:
    """The series of this process, the same ones each time; None where it has nothing to show.

    Engines plan in processes of their own, whose series their server reads from the folder that
    PROMETHEUS_MULTIPROC_DIR names. Without that variable nobody sees them, which is said in the log.

    Args:
        options: whether metrics are enabled.
        is_first_rank: all that is shown is alike on all ranks, so one of them shows it.
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


def bytes_of_one_expert(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of one expert of a layer, given its tensors: each [slots on this rank, ...]."""
    return sum(tensor[0].numel() * tensor.element_size() for tensor in tensors)
