"""The planner of one model inside an engine: history, plan, agreement, report. It always has a valid map."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeAlias

import torch

from ...config.options import PlannerOptions
from ...core.balancedness import balancedness, count_moves
from ...core.errors import LoadError, PlacementError
from ...core.load import as_snapshots, fold_steps
from ...core.placement import Placement
from ...core.topology import Topology
from ...dispatch.rank_costs import split_balancedness
from ...observability.failures import FailureLog
from ...observability.prometheus import ModelTelemetry
from ...planning.move_cost import MoveCost, default_bandwidth, serving_share, with_price
from ...planning.planner import plan
from ...runtime.control.rank_group import RankGroup
from ...runtime.load_window import IntervalLoad
from ...runtime.reports import RebalanceReport
from .agreement import agree_on_plan
from .expert_bytes import ExpertBytes, bytes_moved
from .options import EngineOptions
from .recording import ModelRecorder
from .report_lines import said_of, withdrawn
from .shares import DispatchInForce, IndexMapping

__all__ = ["EnginePlanner", "Inputs", "Refusal"]

_logger = logging.getLogger(__name__)
_REPORTS = 64

Inputs: TypeAlias = Callable[[], tuple[torch.Tensor, Topology]]
"""Gives the load of the interval, [steps, layers, logical] tokens over all ranks, and the topology."""

Refusal: TypeAlias = Callable[[torch.Tensor, torch.Tensor], str | None]
"""Says why the engine would drop a plan, from map in force and plan, int64 [layers, slots]; else None."""


class EnginePlanner:
    """Plans for one model of an engine that counts tokens and moves weights itself.

    A plan depends on the earlier calls alone: ranks with the same calls get the same plans.

    Args:
        model: name of the model in log lines, where there is more than one.
        speaks: whether this rank writes the log line of each rebalance.

    Attributes:
        reports: the latest 64 reports.
        failures: failed rebalances.
        warnings: silent failures of the engine that were seen, by cause.
        telemetry: shows the reports of this rank; None on all ranks but one.
        dispatch: gives the dispatch `balanced` of the engine; None while its own mapping is in force.
        mapping: the engine's own mapping; None where it is even, or not by index.
        recorder: writes the intervals of this rank to a folder; None on all ranks but one, and without one.
    """

    def __init__(self, options: EngineOptions | None = None, *, model: str = "", speaks: bool = True) -> None:
        self.options = options or EngineOptions()
        self.speaks = speaks
        self.reports: deque[RebalanceReport] = deque(maxlen=_REPORTS)
        self.failures = 0
        self.warnings: Counter[str] = Counter()
        self.telemetry: ModelTelemetry | None = None
        self.dispatch: Callable[[], DispatchInForce] | None = None
        self.mapping: IndexMapping | None = None
        self.recorder: ModelRecorder | None = None
        self._name = f" of {model}" if model else ""
        self._history: deque[torch.Tensor] = deque(maxlen=self.options.history)
        self._samples: deque[torch.Tensor] = deque(maxlen=self.options.history)
        self._topology: Topology | None = None
        self._cost: MoveCost | None = None
        self._calls = 0
        self._said: set[str] = set()
        self._failure_log = FailureLog(_logger, f"rebalance{self._name}", "the map in force stays")
        self._size_log = FailureLog(_logger, "reading the size of weights", "reports have no bytes")

    def rebalance(
        self,
        inputs: Inputs,
        current: torch.Tensor,
        *,
        samples: Callable[[], torch.Tensor] | None = None,
        ranks: Callable[[], RankGroup] | None = None,
        expert_bytes: ExpertBytes | None = None,
        refuses: Refusal | None = None,
        steps: Callable[[], int] | None = None,
        waits: bool = True,
        step_seconds: float = 0.0,
    ) -> torch.Tensor:
        """The map for the next interval; `current` after a failure or where the gain is too small.

        All ranks call it together. It raises nothing: failures are logged once, counted and reported.

        Args:
            inputs: called once; may raise.
            current: integer [layers, slots], the map in force, equal on all ranks; it is not written to.
            samples: gives single steps of the interval, int64 [samples, layers, logical], tokens as counted
                over all ranks; for dispatch, mapping and recording. Called after `inputs`; may raise.
            ranks: gives the ranks that compare their plans; None where each may act alone.
            expert_bytes: for the bytes in the report and the price of a move; None where they are unknown.
            refuses: the engine's own rule for dropping a plan; None without one.
            steps: gives the forward steps between two rebalances; None where they are unknown. May raise.
            waits: whether the engine waits for the transfers.
            step_seconds: duration of a forward step on this rank; 0: unknown.

        Returns:
            int64 [layers, slots] on the CPU, in memory of its own. Experts that stay on a rank keep
            their slot.
        """
        self._calls += 1
        old = current.to("cpu", torch.int64, copy=True)
        new, load, topology, single = old, None, None, None
        # A failure has to come before the ranks compare their plans: the others would wait for this one.
        try:
            load, topology = inputs()
            single = load[:0] if samples is None else samples()
            sizes = self._sizes(expert_bytes)
            self._cost = self._cost_of_moves(topology, sizes, 0 if steps is None else steps(), waits)
            new, report = self._place(load, single, topology, old, sizes, refuses)
        except Exception as error:
            new, report = old, self._nothing(self._failure_log.add(error), failed=True)
        if ranks is not None and self.options.check_agreement:
            try:
                agree_on_plan(new, ranks())
            except Exception as error:
                new, report = old, withdrawn(report, self._failure_log.add(error))
        if self.recorder is not None and load is not None and single is not None and topology is not None:
            self.recorder.add(IntervalLoad(load, single), old, topology, expert_bytes, steps, step_seconds)
        self.failures += report.failed
        self.reports.append(report)
        if self.speaks:
            self._log(report)
        if self.telemetry is not None:
            if load is None or report.window_balancedness_before is None:
                self.telemetry.rebalanced(report)
            else:
                self.telemetry.rebalanced(report, load, Placement(new, load.shape[2]), topology)
        return new

    def observe(self, interval_load: torch.Tensor) -> None:
        """Add an interval to the history, folded into `options.snapshots`.

        Args:
            interval_load: [steps, layers, logical], tokens over all ranks, in time order; not written to.

        Raises:
            LoadError: it is malformed, or has other layers or experts than the history.
        """
        load = fold_steps(as_snapshots(interval_load, "interval_load").cpu(), self.options.snapshots)
        if self._history and self._history[0].shape[1:] != load.shape[1:]:
            raise LoadError(
                f"interval_load has layers and experts {tuple(load.shape[1:])}, "
                f"the history {tuple(self._history[0].shape[1:])}"
            )
        self._history.append(load)

    def warn(self, cause: str, line: str) -> None:
        """Count a silent failure of the engine. Each line is logged once, on one rank.

        Args:
            cause: one of `WARNING_CAUSES`.
            line: for the log; empty: counted only.
        """
        self.warnings[cause] += 1
        if line and line not in self._said and self.speaks:
            self._said.add(line)
            _logger.warning("%s", line)
        if self.telemetry is not None:
            self.telemetry.warned(cause)

    def forget(self) -> None:
        """Drop the history. On all ranks alike, when the group of ranks changes for instance."""
        self._history.clear()
        self._samples.clear()

    def plan(self, window: torch.Tensor, topology: Topology, current: Placement) -> Placement:
        """`planning.plan` with the options; override it for a planner of your own.

        The window is float64 [snapshots, layers, logical] in time order, tokens. Where dispatch `balanced` is
        in force, and planned for, the single steps of the window are planned for.
        """
        options = self._priced_options(topology)
        samples = torch.cat(list(self._samples)) if options.dispatch == "balanced" else None
        return plan(window, topology, current, options, samples=samples).placement

    def shares(self, placement: Placement, topology: Topology, samples: torch.Tensor) -> torch.Tensor | None:
        """What each slot gets of its expert's tokens, float64 [layers, slots]; None: even shares.

        Engines override it for a mapping of their own. It is asked for the map in force before `plan` is, and
        for the planned one after that.

        Args:
            samples: int64 [samples, layers, logical], single steps of the interval; there may be none.
        """
        if len(samples) and self.dispatch is not None:
            return self.dispatch().shares(samples, placement, topology)
        return self.mapping.shares(samples, placement) if len(samples) and self.mapping is not None else None

    def _priced_options(self, topology: Topology) -> PlannerOptions:
        """As `_planner_options`, with a number for `move_price: auto` where the cost of moves is known."""
        return with_price(self._planner_options(), self._cost, topology)

    def _planner_options(self) -> PlannerOptions:
        """For the dispatch in force: an engine that could not take ours has said so."""
        options = self.options.planner
        if self.dispatch is None:
            return options.model_copy(update={"dispatch": "even"})
        return options.for_dispatch(self.options.splits)

    def _place(
        self,
        load: torch.Tensor,
        samples: torch.Tensor,
        topology: Topology,
        old: torch.Tensor,
        sizes: Mapping[int, int],
        refuses: Refusal | None,
    ) -> tuple[torch.Tensor, RebalanceReport]:
        """The map to go to, checked, and its report."""
        if topology != self._topology:
            self.forget()
            self._topology = topology
        if not bool(load.any()):  # a profiling run, or an idle engine
            return old, self._nothing("no load was seen")
        samples = samples[samples.any(2).any(1)]
        self.observe(load)
        self._samples.append(samples)
        in_force = Placement(old, load.shape[2])
        shares_before = self.shares(in_force, topology, samples)
        start = time.perf_counter()
        window = torch.cat(list(self._history))
        observes = self.options.mode == "observe"
        new = in_force if observes else self.plan(window, topology, in_force)
        if (new.num_layers, new.num_logical) != (in_force.num_layers, in_force.num_logical):
            raise PlacementError(f"{new} was planned in place of {in_force}")
        # Made anew: its checks run on the present content of the tensor.
        new = Placement(new.physical_to_logical, new.num_logical)
        new.validate(topology)
        seconds = time.perf_counter() - start
        reason = f"no layer gains min_gain={self.options.planner.min_gain}"
        if observes:
            reason = "mode observe plans nothing"
        if refuses is not None and new != in_force and (refusal := refuses(old, new.physical_to_logical)):
            moves = int(count_moves(in_force, new, topology).sum())
            new, reason = in_force, f"a plan of {moves} moves is dropped: {refusal}"
            self.warn("dropped_plan", "")  # the line of this rebalance says it

        interval, ids = self._history[-1], new.physical_to_logical
        shares_after = self.shares(new, topology, samples)
        layers, moves = int((old != ids).any(1).sum()), count_moves(in_force, new, topology)
        levels = [
            balancedness(window, in_force, topology, shares_before),
            balancedness(window, new, topology, shares_after),
        ]
        report = RebalanceReport(
            number=self._calls,
            skipped=not layers,
            reason="" if layers else reason,
            balancedness_before=balancedness(interval, in_force, topology, shares_before),
            balancedness_after=balancedness(interval, new, topology, shares_after),
            window_balancedness_before=levels[0],
            window_balancedness_after=levels[1],
            layers=layers,
            moves=int(moves.sum()),
            bytes_moved=bytes_moved(moves.tolist(), sizes),
            plan_seconds=seconds,
        )
        if self.dispatch is not None and len(samples):
            expert_cost, copies = self.dispatch()
            samples = samples // copies
            even, balanced = split_balancedness(samples, in_force, topology, expert_cost)
            report = replace(report, sampled_balancedness_even=even, sampled_balancedness=balanced)
            levels = [balanced, split_balancedness(samples, new, topology, expert_cost)[1]]
        if self._cost is not None:
            spent, gain = self._cost.move_seconds * report.moves, self._cost.gain_seconds(*levels)
            report = replace(report, move_cost_seconds=spent, gain_seconds=gain)
        return ids, report

    def _sizes(self, expert_bytes: ExpertBytes | None) -> Mapping[int, int]:
        """Bytes of one expert by layer; empty where they are unknown."""
        try:
            return {} if expert_bytes is None else expert_bytes()
        except Exception as error:
            self._size_log.add(error)
            return {}

    def _cost_of_moves(
        self, topology: Topology, sizes: Mapping[int, int], steps: int, waits: bool
    ) -> MoveCost | None:
        """What a move costs by the options, so that all ranks say the same; None where it is unknown."""
        if topology.num_ranks == 1 or not steps or not sum(sizes.values()):
            return None
        return MoveCost(
            expert_bytes=sum(sizes.values()) / len(sizes),
            bandwidth=default_bandwidth(topology, self.options.bandwidth),
            num_ranks=topology.num_ranks,
            num_layers=len(sizes),
            step_seconds=self.options.step_ms / 1000,
            interval=steps,
            serving_share=serving_share("sync" if waits else "async"),
        )

    def _nothing(self, reason: str, *, failed: bool = False) -> RebalanceReport:
        return RebalanceReport.of_nothing(0, reason, number=self._calls, failed=failed)

    def _log(self, report: RebalanceReport) -> None:
        failures = f"; {self.failures} failures so far" if self.failures else ""
        _logger.info("rebalance %d%s: %s%s", report.number, self._name, said_of(report), failures)
