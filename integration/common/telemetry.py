"""The series of an engine's process, and what one expert of it weighs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import TypeAlias

import torch

from ...config.sources import metrics_folder
from ...observability.prometheus import Telemetry
from .options import EngineOptions

__all__ = ["ExpertBytes", "bytes_of_one_expert", "engine_telemetry"]

_logger = logging.getLogger(__name__)

ExpertBytes: TypeAlias = Callable[[], Mapping[int, int]]
"""Gives the bytes of one expert's weights by layer."""


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


def bytes_of_one_expert(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of one expert of a layer from the layer's tensors, each [slots on this rank, ...]."""
    return sum(tensor[0].numel() * tensor.element_size() for tensor in tensors)
