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
    """What one rebalance did. All but the seconds is the same on every rank.

    Attributes:
        step: steps that the rebalancer had seen.
        skipped: whether everything stayed as it was.
        reason: why it was skipped or did not go all the way, else empty.
        failed: whether something failed on some rank. Layers that had switched over before that stay so.
        balancedness_before: of the interval that just ended, under the placement it ran with.
        balancedness_after: of the same interval, had it run under the placement now in force.
        layers: layers whose placement changed.
        moves: transfers of one expert to one rank, over all ranks.
        bytes_moved: bytes sent between ranks, over all ranks; 0 where the engine moves the weights.
        mismatches: experts found with other weights than their fingerprint says, in a slot or on arrival.
        gather_seconds: time to sum the interval over the ranks.
        plan_seconds: time to plan, to hand the plan to every rank and to agree on it.
        transfer_seconds: time to get the weights into the staging buffers.
        commit_seconds: time to write them to their slots and to switch the dispatch tables; the serving
            thread does that.
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
        """That of a rebalance that could not be made, for `reason`; it has no figures."""
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
    """What a `Rebalancer` tells on its rank as it goes. Nothing of it may raise or wait for another rank."""

    def stepped(self) -> None:
        """A forward step has ended."""

    def rebalanced(
        self, report: RebalanceReport, interval_load: torch.Tensor, placement: Placement, topology: Topology
    ) -> None:
        """A rebalance has ended.

        Args:
            report: what it did.
            interval_load: [snapshots, layers, logical], tokens of the interval over all ranks.
            placement: the one in force from now on.
            topology: ranks and slots.
        """

    def ended(self, *, failed: bool) -> None:
        """There will be no more rebalances: something failed, or the balancer was closed."""
