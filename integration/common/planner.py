"""The planner as a policy inside an engine: it keeps the history, and always answers with a valid map."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ...core.balancedness import balancedness, count_moves
from ...core.errors import LoadError, PlacementError
from ...core.load import as_snapshots, fold_steps
from ...core.placement import Placement
from ...core.topology import Topology
from ...observability.prometheus import ModelTelemetry, RebalanceFigures, lower_bound_gap
from ...planning.planner import plan
from .options import EngineOptions

__all__ = ["EnginePlanner", "EngineReport"]

_logger = logging.getLogger(__name__)
_REPORTS = 64


@dataclass(frozen=True, kw_only=True)
class EngineReport:
    """What one call of `EnginePlanner.place` decided. All but the seconds is the same on every rank.

    Attributes:
        number: calls so far, this one included.
        skipped: whether the placement in force stays.
        reason: why it stays, else empty.
        observed: balancedness of the interval that just ended, under the placement in force.
        predicted_before: balancedness of the whole window under the placement in force.
        predicted_after: the same under the planned one.
        layers: layers whose placement changes.
        moves: transfers of one expert's weights to one rank.
        plan_seconds: time that planning took on this rank.
    """

    number: int
    skipped: bool
    reason: str
    observed: float
    predicted_before: float
    predicted_after: float
    layers: int
    moves: int
    plan_seconds: float


class EnginePlanner:
    """Plans for an engine that counts tokens and moves weights itself.

    What it returns depends on nothing but the calls made to it: ranks that make the same calls get the
    same placements. Hand every interval to `observe` before the call of `place` that ends it.

    Args:
        options: of the planner and of its window.

    Attributes:
        telemetry: where this rank shows what happens, or None.
    """

    def __init__(self, options: EngineOptions | None = None) -> None:
        self.options = options or EngineOptions()
        self.telemetry: ModelTelemetry | None = None
        self.reports: deque[EngineReport] = deque(maxlen=_REPORTS)
        self.failures = 0
        self._history: deque[torch.Tensor] = deque(maxlen=self.options.history)
        self._calls = 0
        self._concluded = (0, 0)
        self._placed: tuple[Topology, Placement, Placement] | None = None
        self._told: set[str] = set()

    def observe(self, interval_load: torch.Tensor) -> None:
        """Add an interval to the window. One without load, such as a profiling run's, is ignored.

        Args:
            interval_load: [steps, layers, logical], tokens summed over ranks, in time order; folded into
                `options.snapshots`. It is neither kept nor written to.

        Raises:
            LoadError: it is malformed, or its layers or experts are not those of the history.
        """
        load = fold_steps(as_snapshots(interval_load, "interval_load").cpu(), self.options.snapshots)
        if self._history and self._history[0].shape[1:] != load.shape[1:]:
            raise LoadError(
                f"interval_load has layers and experts {tuple(load.shape[1:])}, "
                f"the history {tuple(self._history[0].shape[1:])}"
            )
        if bool(load.any()):
            self._history.append(load)

    def forget(self) -> None:
        """Drop the history. On all ranks alike, when the group of ranks changes for instance."""
        self._history.clear()

    def place(self, topology: Topology, current: Placement) -> Placement:
        """The placement to go to, valid for `topology`; `current` when planning failed or gains too little.

        It never raises: a failure is logged once per cause, counted in `failures`, and reported. On each
        rank, `current` has to be the same.

        Args:
            topology: nodes, ranks, slots and groups.
            current: the placement in force; it is not written to.

        Returns:
            The placement, on the CPU; experts that stay on a rank keep their slot.
        """
        self._calls += 1
        start = time.perf_counter()
        in_force = current.to("cpu")
        new = in_force
        try:
            if self._history:
                window = torch.cat(list(self._history))
                new = self.plan(window, topology, in_force)
                if (new.num_layers, new.num_logical) != (current.num_layers, current.num_logical):
                    raise PlacementError(f"{new} was planned in place of {current}")
                # Made anew, so that its checks run on what the tensor holds now.
                new = Placement(new.physical_to_logical, new.num_logical)
                new.validate(topology)
                report = self._report(topology, in_force, new, window, start)
            else:
                report = self._stays("no load was seen", start)
        except Exception as error:
            # Whatever is wrong with the plan must not reach the engine, which would act on it unchecked.
            self.failures += 1
            reason = f"planning failed: {type(error).__name__}: {error}"
            if reason not in self._told:
                self._told.add(reason)
                _logger.exception("%s. The placement in force stays; this is said once", reason)
            new, report = in_force, self._stays(reason, start)
        self.reports.append(report)
        self._placed = (topology, in_force, new)
        return new

    def conclude(self, expert_bytes: Callable[[], Mapping[int, int]] | None = None) -> None:
        """Tell the telemetry what came of a rebalance, when no rank can withdraw its plan any more.

        It counts as failed where `failures` has risen since the last one. It never raises.

        Args:
            expert_bytes: gives the bytes of an expert's weights, by layer; None where that is not known.
        """
        calls, failures = self._concluded
        self._concluded = (self._calls, self.failures)
        if self.telemetry is None:
            return
        if self.failures > failures:
            self.telemetry.failed()
        elif self._calls == calls or not self._history:
            self.telemetry.record(lambda: RebalanceFigures(result="skipped"))
        else:
            self.telemetry.record(lambda: self._figures(expert_bytes))

    def plan(self, window: torch.Tensor, topology: Topology, current: Placement) -> Placement:
        """`planning.plan` with the options; the seam for planners of one's own.

        Args:
            window: float64 [snapshots, layers, logical] in time order, tokens.
            topology: nodes, ranks, slots and groups.
            current: the placement in force.
        """
        return plan(window, topology, current, self.options.planner).placement

    def _report(
        self, topology: Topology, old: Placement, new: Placement, window: torch.Tensor, start: float
    ) -> EngineReport:
        seconds = time.perf_counter() - start
        changed = (old.physical_to_logical != new.physical_to_logical).any(1)
        skipped = not bool(changed.any())
        return EngineReport(
            number=self._calls,
            skipped=skipped,
            reason=f"no layer gains min_gain={self.options.planner.min_gain}" if skipped else "",
            observed=balancedness(self._history[-1], old, topology),
            predicted_before=balancedness(window, old, topology),
            predicted_after=balancedness(window, new, topology),
            layers=int(changed.sum()),
            moves=int(count_moves(old, new, topology).sum()),
            plan_seconds=seconds,
        )

    def _figures(self, expert_bytes: Callable[[], Mapping[int, int]] | None) -> RebalanceFigures:
        """The latest report as the telemetry shows it; the engine has no figures of its other phases."""
        assert self._placed is not None
        report, (topology, old, new) = self.reports[-1], self._placed
        moves = count_moves(old, new, topology).tolist()
        sizes = {} if expert_bytes is None else expert_bytes()
        known = all(layer in sizes for layer, moved in enumerate(moves) if moved)
        return RebalanceFigures(
            result="skipped" if report.skipped else "applied",
            observed=report.observed,
            predicted=report.predicted_after,
            gap=lower_bound_gap(self._history[-1], new, topology),
            moves=report.moves,
            bytes_moved=sum(n * sizes.get(layer, 0) for layer, n in enumerate(moves)) if known else None,
            seconds={"plan": report.plan_seconds},
        )

    def _stays(self, reason: str, start: float) -> EngineReport:
        return EngineReport(
            number=self._calls,
            skipped=True,
            reason=reason,
            observed=1.0,
            predicted_before=1.0,
            predicted_after=1.0,
            layers=0,
            moves=0,
            plan_seconds=time.perf_counter() - start,
        )
