"""`Rebalancer`: the online loop that records loads, plans, agrees, moves weights and switches over."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ..config.options import PlannerOptions, RebalancerOptions
from ..core.errors import EplbError, RankLostError, UndecidedError
from ..core.placement import Placement
from ..core.topology import Topology
from ..planning.planner import warmup
from ..planning.policies import policy_for
from .background import Runner
from .connections import connect
from .control.rank_group import RankGroup
from .control.two_phase_commit import Store
from .load_window import IntervalLoad
from .move_times import StepTimes
from .rebalance import Request
from .reports import RebalanceObserver, RebalanceReport
from .startup import Restore, register_again, start_up
from .verify.unregistered import search_unregistered

__all__ = ["RebalanceReport", "Rebalancer"]

_logger = logging.getLogger(__name__)
_REPORTS = 64


class Rebalancer:
    """Balances the experts of a model while it serves. One per rank; all ranks construct it together.

    In each forward step an engine calls `record` and `physical` per MoE layer, then `step` once. Every rank
    calls `step` equally often, with `is_dummy=True` when it had no tokens of its own. The constructor
    compiles the planner, or loads it from the cache on disk, so that no rebalance has to.

    Args:
        topology: one rank for each process of the group.
        num_layers: MoE layers.
        num_logical: logical experts per layer.
        weights: for each layer, its tensors [slots on this rank, ...]: weights, scales, biases. None if the
            engine moves weights itself: then only the maps change.
        placement: where the experts are now; None is the order in which engines load them. After ranks joined
            or failed: int64 [layers, slots] as from `regroup`. Then the constructor fills the slots of -1,
            and restores experts that do not occur.
        restore: loads an expert that no rank holds from a checkpoint. `restore(layer, expert, slot)` writes
            its weights to a slot of this rank, counted on this rank.
        load: [snapshots, layers, logical], tokens: the traffic by which such a placement is completed; that
            of rank 0 counts. None: all experts are equally busy.
        options: of the loop.
        planner: of the planner.
        group: process group; None is the default group, or no group at all for a topology of one rank.
        device: where expert ids arrive; None is where the weights are.
        modules: the MoE layers themselves. A warning names tensors that have slots, but are not among
            `weights`: theirs, and of objects that they refer to.
        store: keeps the decisions of commits; None is the store of the default group.

    Attributes:
        rank: this rank within the group.
        off: why there will be no more rebalances; empty while there will.
        reports: the latest reports.
        warnings: silent failures that were seen, by cause: `unmoved_tensors`, `differing_replicas`. The log
            of rank 0 has a line for each.
        observer: is told of steps, rebalances and warnings on this rank; `serve_metrics` sets it.

    Raises:
        TopologyError: the group has another size, or experts outnumber slots.
        PlacementError, TransferError: the placement or the weights do not fit; EplbError on the other ranks.
        AgreementError: ranks differ in options, placement, or the structure of their weights.
        RankLostError: a rank did not answer.
    """

    def __init__(
        self,
        topology: Topology,
        num_layers: int,
        num_logical: int,
        *,
        weights: Sequence[Sequence[torch.Tensor]] | None = None,
        placement: Placement | torch.Tensor | None = None,
        restore: Restore | None = None,
        load: torch.Tensor | None = None,
        options: RebalancerOptions | None = None,
        planner: PlannerOptions | None = None,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        modules: Sequence[torch.nn.Module] | None = None,
        store: Store | None = None,
    ) -> None:
        self.topology = topology
        self.options = options = options or RebalancerOptions()
        self.planner = planner or PlannerOptions()
        self.reports: deque[RebalanceReport] = deque(maxlen=_REPORTS)
        self.warnings: Counter[str] = Counter()
        self.observer: RebalanceObserver | None = None
        if device is None:
            device = next((t.device for tensors in weights or () for t in tensors), None)
        alone = topology.num_ranks == 1 and group is None
        group_of_engine = RankGroup(group, device, alone=alone)
        unfit: EplbError | None = None
        try:
            self.planner = self.planner.for_dispatch(options.splits)
            policy_for(self.planner)
            topology.check_experts(num_logical)
            group_of_engine.check_topology(topology)
        except EplbError as error:
            unfit = error
        connections = connect(group_of_engine, options, store, with_weights=weights is not None, error=unfit)
        self.rank = connections.control.rank
        try:
            self._context = start_up(
                connections,
                topology,
                (num_layers, num_logical),
                weights=weights,
                placement=placement,
                restore=restore,
                load=load,
                options=options,
                planner=self.planner,
                group=group_of_engine,
            )
            looked_at = ([], []) if modules is None or weights is None else (modules, weights)
            unmoved = search_unregistered(connections.control, *looked_at, topology.slots_by_rank[self.rank])
        except BaseException:
            connections.close()
            raise
        self._warn(unmoved)
        self._context.weights.claim()
        self.window, self.tables = self._context.window, self._context.in_force.tables
        self._steps = 0
        self._step_times = StepTimes()
        self._number = 0
        # Steps and loads of intervals that ended while a rebalance was under way wait for the next one.
        self._waiting: deque[tuple[int, IntervalLoad]] = deque(maxlen=options.history)
        self._runner = Runner(connections, options)
        self.off = ""
        self._replacing = False
        self._told_failure = False
        # Ranks that plan compile the planner now, so that the first rebalance does not wait for it.
        if options.mode != "observe" and (self.rank == 0 or options.planning == "sharded"):
            warmup(dispatch=self.planner.dispatch)

    @property
    def placement(self) -> Placement:
        """The placement in force; its tables are on the CPU."""
        return self._context.in_force.placement

    def record(self, layer: int, expert_ids: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        """Count tokens per logical expert; see `LoadWindow.record`. Hot path: device work only."""
        if not self.off:
            self.window.record(layer, expert_ids, valid)

    def record_counts(self, layer: int, counts: torch.Tensor) -> None:
        """Add counts, integer [logical], tokens; see `LoadWindow.record_counts`."""
        if not self.off:
            self.window.record_counts(layer, counts)

    def physical(self, layer: int, expert_ids: torch.Tensor) -> torch.Tensor:
        """The slots to send tokens to; see `Dispatch.physical`. Hot path: device work only.

        With `dispatch="balanced"` and `batch="sharded"` it is a collective: all ranks call it for each layer
        and batch, also ranks without tokens. On the CPU, the split is computed at once.
        """
        return self.tables.physical(layer, expert_ids)

    def physical_and_received(
        self, layer: int, expert_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `physical`, and the tokens that this rank gets: int64 [ranks, slots on this rank], or None.

        Dispatch `balanced` has them of sharded batches on the CPU. Else ranks have to exchange them.
        """
        return self.tables.physical_and_received(layer, expert_ids)

    def step(self, is_dummy: bool = False) -> RebalanceReport | None:
        """End a forward step. All ranks call it; every `interval` steps a rebalance begins.

        Returns:
            The report of a rebalance that ended in this step, which is the same on every rank. Failures are
            reported, not raised: the placement in force stays, and the next interval tries again. After the
            loss of a rank, there are no more rebalances, and `off` says why.

        Raises:
            UndecidedError: a rank and the store were lost during a commit, and this rank cannot learn whether
                the others switched. It must not serve on.
        """
        if self.off:
            self._check_decided()
            return None
        self.window.step(is_dummy)
        self._steps += 1
        self._step_times.stepped()
        if self.observer is not None:
            self.observer.stepped()
        report = None
        if self._runner.busy:
            self._runner.step_ended(self._steps)
            report = self._collect()
        if self.off or self._steps % self.options.interval:
            return report
        self._end_interval()
        if self._runner.busy or self._replacing:
            return report
        if self.options.mode == "sync":
            return self._run()
        self._runner.start(self._context, self._request())
        return report

    def rebalance(self) -> RebalanceReport:
        """Plan from the recorded loads and switch now. A rebalance under way is finished first.

        All ranks call it. Returns and raises as `step`.
        """
        self._finish()
        if self.off:
            self._check_decided()
            return RebalanceReport.of_nothing(self._steps, self.off)
        if self._replacing:
            return RebalanceReport.of_nothing(self._steps, "the engine is replacing weights")
        if self.window.steps:
            self._end_interval()
        return self._run()

    @contextmanager
    def replacing_weights(self) -> Iterator[None]:
        """Within this context, the engine loads other weights into the slots, by the placement in force.

        All ranks enter and leave it at the same step. A rebalance under way is finished first, and none
        begins before the end. Then the tensors are registered again, at their new addresses, and their
        fingerprints taken. After an error within, there are no more rebalances.

        Raises:
            TransferError, AgreementError: the weights cannot be moved any more, see the constructor.
            RankLostError: another rank did not answer, or failed within. UndecidedError: as of `step`.
        """
        self._finish()
        self._check_decided()
        self._replacing = True
        try:
            yield
            if not self.off:
                self._context = register_again(self._context)
                self._warn()
        except BaseException as error:
            if not self.off:
                self._end(f"weights were not replaced: {type(error).__name__}: {error}")
            raise
        finally:
            self._replacing = False
            self._step_times.interrupted()

    def close(self) -> None:
        """End balancing for good; a rebalance under way is finished first. All ranks call it."""
        self._finish()
        if self._context.recorder is not None:
            self._context.recorder.flush(self.options.time_limit)
        if not self.off:
            self._end("closed", failed=False)

    def _warn(self, unmoved: str = "") -> None:
        """Log and count what is wrong with the weights that are registered now."""
        prints = self._context.fingerprints
        differing = "" if prints is None else prints.differing
        for cause, line in (("unmoved_tensors", unmoved), ("differing_replicas", differing)):
            if line:
                self.warnings[cause] += 1
                if self.rank == 0:
                    _logger.warning("%s", line)
                if self.observer is not None:
                    self.observer.warned(cause)

    def _finish(self) -> None:
        if self._runner.busy:
            self._runner.finish()
            self._collect()

    def _end_interval(self) -> None:
        """The oldest of too many waiting intervals makes room."""
        if len(self._waiting) == self._waiting.maxlen and self._context.recorder is not None:
            self._context.recorder.lose(f"{len(self._waiting)} intervals wait for a rebalance to end")
        self._waiting.append((self.window.steps, self.window.take()))

    def _request(self) -> Request:
        self._number += 1
        self._context.streams.mark()
        waiting, self._waiting = self._waiting, deque(maxlen=self._waiting.maxlen)
        return Request(
            number=self._number,
            step=self._steps,
            intervals=[load for _, load in waiting],
            num_steps=sum(steps for steps, _ in waiting),
            step_seconds=self._step_times.take(),
        )

    def _run(self) -> RebalanceReport:
        """Rebalance within this step."""
        self._runner.run(self._context, self._request())
        self._step_times.interrupted()
        report = self._collect()
        assert report is not None
        return report

    def _collect(self) -> RebalanceReport | None:
        """The report of a rebalance that has ended."""
        outcome, error = self._runner.take(), self._runner.error
        if error is not None:
            return self._turn_off(error)
        if outcome is None:
            return None
        report = outcome.report
        self.reports.append(report)
        if report.failed and not self._told_failure:
            self._told_failure = True
            _logger.error("%s. Later failures are only reported", report.reason)
        if self.observer is not None:
            self.observer.rebalanced(report, outcome.interval_load, outcome.placement, self.topology)
        return report

    def _turn_off(self, error: Exception) -> RebalanceReport:
        """No more rebalances."""
        self._end(self._runner.reason)
        if isinstance(error, UndecidedError):
            _logger.critical("rank %d does not know which weights other ranks use: %s", self.rank, self.off)
        else:
            told = "expert balancing is turned off on rank %d; the placement in force stays. %s"
            cause = None if isinstance(error, RankLostError) else error
            _logger.error(told, self.rank, self.off, exc_info=cause)
        self._check_decided()
        report = RebalanceReport.of_nothing(self._steps, self.off)
        self.reports.append(report)
        return report

    def _end(self, reason: str, *, failed: bool = True) -> None:
        self.off = reason
        # Ranks that wait for this one get an error at once, instead of at the time limit.
        self._context.connections.close()
        self._context.weights.release()
        if self.observer is not None:
            self.observer.ended(failed=failed)

    def _check_decided(self) -> None:
        if isinstance(self._runner.error, UndecidedError):
            raise self._runner.error
