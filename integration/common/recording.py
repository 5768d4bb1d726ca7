"""Recording in an engine: intervals of one model go to the recorder, and no failure reaches the engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from ...core.placement import Placement
from ...core.topology import Topology
from ...observability.failures import FailureLog
from ...runtime.load_window import IntervalLoad
from ...runtime.recorder import Recorder
from .expert_bytes import ExpertBytes

__all__ = ["ModelRecorder"]

_logger = logging.getLogger(__name__)


class ModelRecorder:
    """Records one model of an engine, on its first rank alone.

    Args:
        folder: of the files.
        max_mib: bound on their size, in MiB.
        engine, model: their names.
        layer_ids: layer of the model of each row; empty: unknown.
        copies: ranks that count each token.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(
        self, folder: str, max_mib: int, engine: str, model: str, layer_ids: Sequence[int], copies: int
    ) -> None:
        self.files = Recorder(folder, max_mib, engine=engine, model=model, layer_ids=layer_ids, copies=copies)
        self._failure_log = FailureLog(_logger, f"recording {model}", "that interval is missing")
        _logger.info("eplb_plugin: loads of %s are recorded in %s", model, self.files.folder.absolute())

    def add(
        self,
        interval: IntervalLoad,
        in_force: torch.Tensor,
        topology: Topology,
        expert_bytes: ExpertBytes | None,
        steps: Callable[[], int] | None,
        step_seconds: float,
    ) -> None:
        """Have an interval written beside serving. Failures are logged once and raised never.

        Args:
            interval: tokens as counted over all ranks.
            in_force: int64 [layers, slots] on the CPU, the map that the interval ran with.
            topology: ranks, nodes, slots and groups.
            expert_bytes: gives the bytes of one expert's weights by layer; None where they are unknown.
            steps: gives the forward steps of the interval; None where they are unknown.
            step_seconds: duration of a forward step; 0: unknown.
        """
        try:
            sizes = {} if expert_bytes is None else expert_bytes()
            self.files.add(
                IntervalLoad(*(part.to("cpu", torch.int64) for part in interval)),
                Placement(in_force, interval.snapshots.shape[2]),
                topology,
                expert_bytes=sum(sizes.values()) / len(sizes) if sizes else 0.0,
                step_seconds=step_seconds,
                num_steps=0 if steps is None else steps(),
            )
        except Exception as error:
            self._failure_log.add(error)
