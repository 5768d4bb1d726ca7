"""What one rebalance did: the same report from the online loop and from the engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ..core.placement import Placement
from ..core.topology import Topology

__all__ = ["RebalanceObserver", "RebalanceReport"]


@dataclass(frozen=True, kw_only=True)
class RebalanceReport:
    """One rebalance. All but the seconds is equal on all ranks, unless one of them failed.

    Engines gather loads and move weights themselves: there, those seconds are 0 and nothing is checked.

    Attributes:
        step: forward steps of the rebalancer so far; 0 in an engine.
        number: rebalances of the model so far, this one included; 0 in the online loop.
        skipped: whether the placement stayed.
        reason: cause of a skip or of a failure, else empty.
        failed: whether some rank failed. Layers that had switched before stay switched.
        balancedness_before: of the latest interval, under its own placement; 1 without load.
        balancedness_after: of the same interval, under the placement now in force.
        window_balancedness_before: of the whole window, under the old placement; None if unknown.
        window_balancedness_after: of the whole window, under the placement now in force; None if unknown.
        layers: layers with a new placement.
        moves: transfers of one expert's weights to one rank, over all ranks.
        bytes_moved: bytes sent between ranks, over all ranks; 0 for a loop without weights, None if unknown.
        mismatches: experts with another fingerprint than expected, in a slot or on arrival.
        gather_seconds: time to sum the interval over the ranks.
        plan_seconds: time to plan; in the online loop also to broadcast the plan and to agree on it.
        transfer_seconds: time to fill the staging buffers.
        commit_seconds: time of the serving thread to fill the slots and to switch the dispatch tables.
    """

    step: int = 0
    number: int = 0
    skipped: bool
    reason: str
    failed: bool = False
    balancedness_before: float
    balancedness_after: float
    window_balancedness_before: float | None = None
    window_balancedness_after: float | None = None
    layers: int
    moves: int
    bytes_moved: int | None
    mismatches: int = 0
    gather_seconds: float = 0.0
    plan_seconds: float
    transfer_seconds: float = 0.0
    commit_seconds: float = 0.0

    @classmethod
    def of_nothing(cls, step: int, reason: str, *, number: int = 0, failed: bool = True) -> RebalanceReport:
        """The report of a rebalance without figures: it failed, or there was nothing to plan from."""
        return cls(
            step=step,
            number=number,
            skipped=True,
            reason=reason,
            failed=failed,
            balancedness_before=1.0,
            balancedness_after=1.0,
            layers=0,
            moves=0,
            bytes_moved=0,
            plan_seconds=0.0,
        )


class RebalanceObserver(Protocol):
    """Listens to one model on one rank. No method may raise, or wait for another rank."""

    def stepped(self) -> None:
        """A forward step has ended."""

    def rebalanced(
        self, report: RebalanceReport, interval_load: torch.Tensor, placement: Placement, topology: Topology
    ) -> None:
        """A rebalance has ended.

        Args:
            report: its report.
            interval_load: [snapshots, layers, logical], tokens of the interval over all ranks.
            placement: the placement now in force.
            topology: nodes, ranks, slots and groups.
        """

    def ended(self, *, failed: bool) -> None:
        """The last rebalance is over: something failed, or the balancer was closed."""
