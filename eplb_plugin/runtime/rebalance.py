"""One rebalance, from recorded loads to the placement in force: the same on all ranks, or nowhere.

Its phases are those of `PHASES`. Whatever fails on a rank before a hop is committed is told to all in a vote,
and all of them keep what they have. A rank that cannot be reached ends the balancing, see `RankLostError`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..core.balancedness import balancedness
from ..core.errors import AgreementError, EplbError, LoadError, RankLostError
from ..core.placement import Placement
from ..planning.planner import plan
from .context import Parts
from .control.rank_group import fingerprint
from .control.scheduling import Pace
from .relocation import Move
from .reports import RebalanceReport

__all__ = ["PHASES", "Outcome", "Rebalance"]

PHASES = ("gather", "plan", "agree", "audit", "stage", "commit", "decided", "end")


_LAYERS_AT_ONCE = 4  # layers that the background plans before it rests


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of a rebalance.

    Attributes:
        report: what it did.
        interval_load: [snapshots, layers, logical], tokens of the interval over all ranks.
        placement: the one in force from now on.
    """

    report: RebalanceReport
    interval_load: torch.Tensor
    placement: Placement


class Rebalance:
    """One rebalance on one rank; all ranks run theirs together.

    Args:
        parts: what it works with.
        number: which one it is, the same on every rank.
        step: steps that the rank had ended when the interval did.
        intervals: what this rank recorded in the intervals since the last rebalance, int64 [snapshots,
            layers, logical] each, tokens.
        placement: the one in force.
        pace: when to switch over.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        number: int,
        step: int,
        intervals: Sequence[torch.Tensor],
        placement: Placement,
        pace: Pace,
    ) -> None:
        self._parts = parts
        self._number = number
        self._step = step
        self._intervals = list(intervals)
        self._old = placement
        self._pace = pace
        # Written to by whichever thread switches over, in inference mode or not.
        with torch.inference_mode(False):
            now = placement.physical_to_logical.clone()
        self._interval_load = now.new_zeros(0, placement.num_layers, placement.num_logical)
        self._notes: list[str] = []
        self._gather_seconds = self._plan_seconds = 0.0
        self._way = Move(parts, number, now, placement.num_logical, pace, self._begin)

    def run(self, ended: Callable[[Outcome], None]) -> None:
        """Go through all phases. `ended` gets the outcome, where and when the pace has commits done.

        Raises:
            RankLostError: a rank does not answer; layers have their old placement or their new one, alike on
                all ranks that answer. UndecidedError: what they have cannot be known here.
        """
        failed = False
        self._pace.rest()
        with self._parts.order.background():
            try:
                self._gather()
                self._move(self._plan())
            except RankLostError:
                raise
            except EplbError as error:
                failed = True
                self._notes.append(str(error))
            self._begin("end")
            self._pace.rest()
            outcome = self._outcome(failed)
            self._pace.rest()
            fence = self._pace.propose()
            last = max(self._parts.channels.control.vote(self._phase("ending"), value=fence))
        self._pace.release(last, [partial(ended, outcome)])

    def _gather(self) -> None:
        """All ranks: sum what they recorded."""
        self._begin("gather")
        start = time.perf_counter()
        parts, control = self._parts, self._parts.channels.control
        parts.order.catch_up()
        loads: list[torch.Tensor] = []
        error = None
        try:
            parts.weights.check()
            loads = [self._checked(load) for load in self._intervals]
        except Exception as caught:
            error = caught
        snapshots = sum(load.shape[0] for load in loads)
        if len(set(control.vote(self._phase("taking the load"), error, snapshots))) > 1:
            raise AgreementError(f"ranks took part in different numbers of steps, here {snapshots} snapshots")
        parts.channels.decisions.forget(delete=control.rank == 0)
        for load in loads:
            parts.window.push(control.sum(load))
        if loads:
            self._interval_load = torch.cat(loads)
        self._gather_seconds = time.perf_counter() - start
        self._pace.rest()

    def _checked(self, load: torch.Tensor) -> torch.Tensor:
        load = load.cpu()
        if load.dtype != torch.int64 or load.shape[1:] != self._interval_load.shape[1:]:
            raise LoadError(
                f"the recorded load is {load.dtype} {tuple(load.shape)}, not int64 "
                f"[snapshots, {self._interval_load.shape[1]}, {self._interval_load.shape[2]}]"
            )
        if load.numel() and int(load.min()) < 0:
            raise LoadError(f"the recorded load holds {int(load.min())} tokens")
        return load

    def _plan(self) -> torch.Tensor:
        """All ranks: the rows to go to, int64 [layers, slots]; those in force where nothing was recorded."""
        self._begin("plan")
        start = time.perf_counter()
        parts, control = self._parts, self._parts.channels.control
        load = parts.window.load()
        if not bool(load.any()):
            self._notes.append("no load was recorded")
            return self._way.now.clone()
        layers = self._old.num_layers
        leader = parts.options.planning == "leader"
        share = layers if leader else -(-layers // control.size)
        first = min(control.rank * share, layers)
        last = min(first + share, layers)
        rows = torch.zeros(share, parts.topology.num_slots, dtype=torch.int64)

        def work() -> None:
            # Layers are planned each on its own, so that any number of them may be planned at once.
            at_once = max(share, 1) if self._pace.piece is None else _LAYERS_AT_ONCE
            for start in range(first, last, at_once):
                end = min(start + at_once, last)
                current = Placement(self._way.now[start:end], self._old.num_logical)
                planned = plan(load[:, start:end], parts.topology, current, parts.planner)
                rows[start - first : end - first] = planned.placement.physical_to_logical
                self._pace.rest()

        control.attempt(self._phase("planning"), work)
        self._begin("agree")
        rows = control.broadcast(rows) if leader else control.all_gather(rows).flatten(0, 1)[:layers]
        control.agree("the plan", fingerprint(rows))
        Placement(rows, self._old.num_logical)  # raises on all ranks alike
        if torch.equal(rows, self._way.now):
            self._notes.append(f"no layer gains min_gain={parts.planner.min_gain}")
        self._plan_seconds = time.perf_counter() - start
        self._pace.rest()
        return rows

    def _move(self, goal: torch.Tensor) -> None:
        """All ranks: move weights and switch over. What turns out damaged is replaced."""
        damaged = []
        if self._parts.fingerprints is not None:
            self._begin("audit")
            self._parts.order.catch_up()
            damaged = self._way.damage.audit(self._way.now, self._pace.rest)
        self._way.run(goal, damaged)

    def _outcome(self, failed: bool) -> Outcome:
        old = self._old
        way = self._way
        new = Placement(way.now, old.num_logical)
        layers = int((way.now != old.physical_to_logical).any(1).sum())
        report = RebalanceReport(
            step=self._step,
            skipped=not layers and not way.moves,
            reason="; ".join([*self._notes, *way.notes]),
            failed=failed,
            balancedness_before=self._balancedness(old),
            balancedness_after=self._balancedness(new),
            layers=layers,
            moves=way.moves,
            bytes_moved=way.num_bytes,
            mismatches=way.damage.mismatches,
            gather_seconds=self._gather_seconds,
            plan_seconds=self._plan_seconds,
            transfer_seconds=way.transfer_seconds,
            commit_seconds=way.commit_seconds,
        )
        return Outcome(report, self._interval_load, new)

    def _balancedness(self, placement: Placement) -> float:
        if not self._interval_load.shape[0]:
            return 1.0
        return balancedness(self._interval_load, placement, self._parts.topology)

    def _phase(self, name: str) -> str:
        return f"{name} in rebalance {self._number}"

    def _begin(self, phase: str) -> None:
        """A phase begins, on all ranks at about the same time."""
        self._pace.met()
        self._enter(phase)

    def _enter(self, phase: str) -> None:
        """A phase begins. Tests have ranks fail here."""
