"""Reports of rebalances: written while one runs, told to an observer at its end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..core.placement import Placement
from ..core.topology import Topology

__all__ = ["DraftReport", "RebalanceObserver", "RebalanceReport"]


@dataclass(frozen=True, kw_only=True)
class RebalanceReport:
    """The result of one rebalance; the same on every rank, but for the seconds.

    Attributes:
        step: steps that the rebalancer had seen.
        skipped: whether nothing changed.
        reason: why it was skipped, or why layers kept their placement; else empty.
        failed: whether something failed on some rank. Layers committed before that keep the new placement.
        balancedness_before: of the interval, under the placement it ran with.
        balancedness_after: of the same interval under the placement now in force.
        layers: layers whose placement changed.
        moves: transfers of one expert to one rank, over all ranks.
        bytes_moved: bytes sent between ranks, over all ranks; 0 if the engine moves the weights.
        mismatches: experts whose weights did not match their fingerprint, in a slot or on arrival.
        gather_seconds: time to sum the interval over the ranks.
        plan_seconds: time to plan, to exchange the plan and to agree on it.
        transfer_seconds: time to get the weights into the staging memory, and to verify them.
        commit_seconds: time of the serving thread to write slots and dispatch tables.
    """

    step: int
    skipped: bool
    reason: str
    failed: bool = False
    balancedness_before: float = 1.0
    balancedness_after: float = 1.0
    layers: int = 0
    moves: int = 0
    bytes_moved: int = 0
    mismatches: int = 0
    gather_seconds: float = 0.0
    plan_seconds: float = 0.0
    transfer_seconds: float = 0.0
    commit_seconds: float = 0.0

    @classmethod
    def of_nothing(cls, step: int, reason: str) -> RebalanceReport:
        """The report of a rebalance that was impossible, for `reason`."""
        return cls(step=step, skipped=True, reason=reason, failed=True)


class DraftReport:
    """The report of a rebalance that is under way: sums under the names of the report's fields.

    So a new figure takes one line where it is measured, and its field in `RebalanceReport`.

    Attributes:
        notes: parts of the reason.
        failed: as in the report.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self.notes: list[str] = []
        self.failed = False

    def add(self, **amounts: float) -> None:
        """Add to fields: `draft.add(moves=3, bytes_moved=600)`."""
        for field, amount in amounts.items():
            self._sums[field] = self._sums.get(field, 0) + amount

    @contextmanager
    def timing(self, field: str) -> Iterator[None]:
        """Add the seconds within to a field, unless an error leaves it."""
        start = time.perf_counter()
        yield
        self.add(**{field: time.perf_counter() - start})

    def finish(self, step: int) -> RebalanceReport:
        """The report, once the rebalancer has seen `step` steps."""
        return RebalanceReport(
            step=step,
            skipped=not (self._sums.get("layers") or self._sums.get("moves")),
            reason="; ".join(self.notes),
            failed=self.failed,
            **self._sums,
        )


class RebalanceObserver(Protocol):
    """Is told of steps and rebalances by a `Rebalancer`. It must neither raise nor wait for other ranks."""

    def stepped(self) -> None:
        """A forward step has ended."""

    def rebalanced(
        self, report: RebalanceReport, interval_load: torch.Tensor, placement: Placement, topology: Topology
    ) -> None:
        """A rebalance has ended.

        Args:
            report: its result.
            interval_load: [snapshots, layers, logical], tokens of the interval over all ranks.
            placement: the one in force from now on.
            topology: ranks and slots.
        """

    def ended(self, *, failed: bool) -> None:
        """There will be no more rebalances: something failed, or the balancer was closed."""
