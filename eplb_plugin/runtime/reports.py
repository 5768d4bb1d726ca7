"""Reports of rebalances, of the online loop and of engines: written while one runs, told at its end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..core.placement import Placement
from ..core.topology import Topology
from ..planning.move_cost import MoveCost

__all__ = ["DraftReport", "RebalanceObserver", "RebalanceReport"]


@dataclass(frozen=True, kw_only=True)
class RebalanceReport:
    """The result of one rebalance; all but the seconds is equal on all ranks, unless one of them failed.

    Engines gather loads and move weights themselves: there, those seconds are 0 and nothing is verified.

    Attributes:
        step: forward steps of the rebalancer so far; 0 in an engine.
        number: rebalances of the model so far, this one included; 0 in the online loop.
        skipped: whether nothing changed.
        reason: why it was skipped, or why layers kept their placement; else empty.
        failed: whether some rank failed. Layers committed before that keep the new placement.
        balancedness_before: of the latest interval, under the placement it ran with; 1 without load.
        balancedness_after: of the same interval, under the placement now in force.
        window_balancedness_before: of the whole window, under the old placement; None if unknown.
        window_balancedness_after: of the whole window, under the placement now in force; None if unknown.
        sampled_balancedness_even: of single steps by rank costs, under the old placement, with the even
            split; None without dispatch `balanced`.
        sampled_balancedness: of the same steps, with the split of dispatch `balanced`.
        layers: layers with a new placement.
        moves: transfers of one expert's weights to one rank, over all ranks.
        bytes_moved: bytes sent between ranks, over all ranks; 0 for a loop without weights, None if unknown.
        move_cost_seconds: time that serving loses by the moves, by bytes and bandwidth; None if unknown.
        gain_seconds: expected fall of the slowest ranks' time until the next rebalance. It is the time of the
            latest interval under the old placement, less its time under the new one. None if unknown.
        mismatches: experts whose weights did not match their fingerprint, in a slot or on arrival.
        gather_seconds: time to sum the interval over the ranks.
        plan_seconds: time to plan; in the online loop also to exchange the plan and to agree on it.
        transfer_seconds: time to get the weights into the staging memory, and to verify them.
        commit_seconds: time of the serving thread to write slots and dispatch tables.
    """

    step: int = 0
    number: int = 0
    skipped: bool
    reason: str
    failed: bool = False
    balancedness_before: float = 1.0
    balancedness_after: float = 1.0
    window_balancedness_before: float | None = None
    window_balancedness_after: float | None = None
    sampled_balancedness_even: float | None = None
    sampled_balancedness: float | None = None
    layers: int = 0
    moves: int = 0
    bytes_moved: int | None = 0
    move_cost_seconds: float | None = None
    gain_seconds: float | None = None
    mismatches: int = 0
    gather_seconds: float = 0.0
    plan_seconds: float = 0.0
    transfer_seconds: float = 0.0
    commit_seconds: float = 0.0

    @classmethod
    def of_nothing(cls, step: int, reason: str, *, number: int = 0, failed: bool = True) -> RebalanceReport:
        """The report of a rebalance without figures: it failed, or there was nothing to plan from."""
        return cls(step=step, number=number, skipped=True, reason=reason, failed=failed)


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

    def finish(self, step: int, cost: MoveCost | None = None) -> RebalanceReport:
        """The report, once the rebalancer has seen `step` steps; `cost`: of a move, if it is known."""
        if cost is not None:
            self.add(move_cost_seconds=cost.move_seconds * self._sums.get("moves", 0))
        return RebalanceReport(
            step=step,
            skipped=not (self._sums.get("layers") or self._sums.get("moves")),
            reason="; ".join(self.notes),
            failed=self.failed,
            **self._sums,
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
            report: its result.
            interval_load: [snapshots, layers, logical], tokens of the interval over all ranks.
            placement: the placement now in force.
            topology: nodes, ranks, slots and groups.
        """

    def warned(self, cause: str) -> None:
        """A silent failure was seen, such as `differing_replicas`; the log has a line."""

    def ended(self, *, failed: bool) -> None:
        """The last rebalance is over: something failed, or the balancer was closed."""
