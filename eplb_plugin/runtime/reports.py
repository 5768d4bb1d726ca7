"""What a rebalance did, and who wants to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ..core.placement import Placement
from ..core.topology import Topology

__all__ = ["RebalanceObserver", "RebalanceReport"]


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
    balancedness_before: float
    balancedness_after: float
    layers: int
    moves: int
    bytes_moved: int
    mismatches: int = 0
    gather_seconds: float
    plan_seconds: float
    transfer_seconds: float
    commit_seconds: float

    @classmethod
    def of_nothing(cls, step: int, reason: str) -> RebalanceReport:
        """That of a rebalance that could not be made, for `reason`; it has no figures."""
        return cls(
            step=step,
            skipped=True,
            reason=reason,
            failed=True,
            balancedness_before=1.0,
            balancedness_after=1.0,
            layers=0,
            moves=0,
            bytes_moved=0,
            gather_seconds=0.0,
            plan_seconds=0.0,
            transfer_seconds=0.0,
            commit_seconds=0.0,
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
