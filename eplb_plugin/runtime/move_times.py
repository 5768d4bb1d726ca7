"""Durations of steps and transfers on this rank, and the cost of a move that all ranks agree on."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence

import torch

from ..config.options import RebalancerOptions
from ..core.topology import Topology
from ..planning.move_cost import MoveCost, default_bandwidth, serving_share
from .weights.expert_weights import ExpertWeights

__all__ = ["StepTimes", "TransferTimes", "move_cost_of", "times_to_sum"]

_ROUNDS = 1024  # latest rounds of messages that count
_MOST_STEPS = 8192  # latest steps that count


class StepTimes:
    """Durations of the forward steps since the last rebalance. For the serving thread."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_MOST_STEPS)
        self._last: float | None = None

    def stepped(self) -> None:
        """A step has ended."""
        now = time.perf_counter()
        if self._last is not None:
            self._seconds.append(now - self._last)
        self._last = now

    def interrupted(self) -> None:
        """The engine does something else before the next step."""
        self._last = None

    def take(self) -> float:
        """The median in seconds, since an idle engine waits between steps; 0: unknown. Starts anew."""
        median = statistics.median(self._seconds) if self._seconds else 0.0
        self._seconds.clear()
        return median


class TransferTimes:
    """Bytes and durations of the rounds of messages of this rank."""

    def __init__(self) -> None:
        self._rounds: deque[tuple[int, float]] = deque(maxlen=_ROUNDS)

    def add(self, rounds: Sequence[tuple[int, float]]) -> None:
        """Count rounds: bytes of the busier direction, and seconds from the first message to the last."""
        self._rounds.extend((num_bytes, max(seconds, 1e-9)) for num_bytes, seconds in rounds if num_bytes)

    @property
    def bandwidth(self) -> float:
        """Bytes per second: the median of the rounds by their bytes; 0 before the first one.

        The mean would count the pauses of other ranks, for which slow rounds have waited.
        """
        left = sum(num_bytes for num_bytes, _ in self._rounds) / 2
        for num_bytes, seconds in sorted(self._rounds, key=lambda item: item[0] / item[1]):
            left -= num_bytes
            if left <= 0:
                return num_bytes / seconds
        return 0.0


def times_to_sum(step_seconds: float, transfers: TransferTimes) -> torch.Tensor:
    """int64 [4]: nanoseconds of a step, KB/s, and whether each is known; integers sum alike on all ranks."""
    step, bandwidth = round(1e9 * step_seconds), round(transfers.bandwidth / 1e3)
    return torch.tensor([step, bandwidth, int(step > 0), int(bandwidth > 0)], device="cpu")


def move_cost_of(
    total: torch.Tensor, weights: ExpertWeights, topology: Topology, options: RebalancerOptions
) -> MoveCost | None:
    """The cost of a move, the same on all ranks; None for a loop that moves no weights.

    Args:
        total: int64 [4], `times_to_sum` summed over the ranks; options stand in for unknown times.
        weights: equal in structure on all ranks.
    """
    sizes = weights.expert_bytes
    if topology.num_ranks == 1 or not sum(sizes):
        return None
    step, bandwidth, timed, sent = total.tolist()
    return MoveCost(
        expert_bytes=sum(sizes) / len(sizes),
        bandwidth=1e3 * bandwidth / sent if sent else default_bandwidth(topology, options.bandwidth),
        num_ranks=topology.num_ranks,
        num_layers=len(sizes),
        step_seconds=1e-9 * step / timed if timed else options.step_ms / 1000,
        interval=options.interval,
        serving_share=serving_share(options.mode),
    )
