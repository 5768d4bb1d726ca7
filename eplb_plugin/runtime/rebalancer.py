"""`Rebalancer`: the online loop that records loads, plans, agrees, moves weights and switches over."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ..config import PlannerOptions, RebalancerOptions
from ..errors import EplbError, PlacementError, TransferError
from ..metrics import balancedness
from ..migration import plan_migration
from ..placement import Placement
from ..planning.planner import plan
from ..topology import Topology
from ..warmup import warmup
from ..window import LoadWindow
from .collectives import RankGroup, fingerprint, try_action
from .dispatch import DispatchTables
from .reports import RebalanceObserver, RebalanceReport
from .transfer import Staging, execute
from .weights import ExpertWeights

__all__ = ["RebalanceReport", "Rebalancer"]

_logger = logging.getLogger(__name__)
_REPORTS = 64


class Rebalancer:
    """Balances the experts of a model while it serves. One per rank; all ranks construct it together.

    In each forward step an engine calls `record` and `physical` per MoE layer, then `step` once; every
    rank calls `step` equally often, with `is_dummy=True` where it had no tokens of its own. Constructing it
    compiles the planner, or loads it from the cache on disk, so that no rebalance has to.

    Args:
        topology: one rank for each process of the group.
        num_layers: MoE layers.
        num_logical: logical experts per layer.
        weights: for each layer, its tensors [slots on this rank, ...]: weights, scales, biases. None
            where the engine moves weights itself: then only the maps change.
        placement: where the experts are now; None is the order that engines load them in.
        options: of the loop.
        planner: of the planner.
        group: process group; None is the default group, or no group at all for a topology of one rank.
        device: where expert ids arrive; None is where the weights are.

    Attributes:
        reports: the latest reports.
        observer: is told of steps and rebalances on this rank, `telemetry.serve_metrics` for one sets it.

    Raises:
        TopologyError: the group has another size, or experts outnumber slots.
        PlacementError, TransferError: the placement or the weights do not fit; EplbError on ranks where
            they do, but not on another.
        AgreementError: ranks differ in options, placement, or the structure of their weights.
    """

    def __init__(
        self,
        topology: Topology,
        num_layers: int,
        num_logical: int,
        *,
        weights: Sequence[Sequence[torch.Tensor]] | None = None,
        placement: Placement | None = None,
        options: RebalancerOptions | None = None,
        planner: PlannerOptions | None = None,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.topology = topology
        self.options = options or RebalancerOptions()
        self.planner = planner or PlannerOptions()
        self.reports: deque[RebalanceReport] = deque(maxlen=_REPORTS)
        self.observer: RebalanceObserver | None = None
        topology.check_experts(num_logical)
        if device is None:
            device = next((t.device for tensors in weights or () for t in tensors), None)
        alone = topology.num_ranks == 1 and group is None
        self._group = RankGroup(group, device, alone=alone)
        self._group.check_topology(topology)
        self._staging = Staging(self.options.staging_mib << 20)
        self._steps = 0
        self._told_failure = False

        # All ranks: what can be wrong on one of them is checked before anyone goes on.
        def check() -> tuple[Placement, ExpertWeights]:
            start = placement or Placement.default(num_layers, num_logical, topology.num_slots)
            start.validate(topology)
            if (start.num_layers, start.num_logical) != (num_layers, num_logical):
                raise PlacementError(f"{start} is not for {num_layers} layers of {num_logical} experts")
            if weights is not None and len(weights) != num_layers:
                raise TransferError(f"weights of {len(weights)} layers were given, num_layers={num_layers}")
            return start.to("cpu"), ExpertWeights(weights or [[]] * num_layers, topology)

        self._placement, self._weights = self._group.attempt("registration", check, EplbError)
        described = f"{topology} {self.options.model_dump_json()} {self.planner.model_dump_json()}"
        self._group.agree("topology and options", fingerprint(described))
        self._group.agree("the placement at the start", fingerprint(self._placement.physical_to_logical))
        self._group.agree("the structure of the expert weights", fingerprint(self._weights.signature))

        self.window = LoadWindow(
            num_layers,
            num_logical,
            interval=self.options.interval,
            snapshots=self.options.snapshots,
            history=self.options.history,
            device=self._group.device,
        )
        self.tables = DispatchTables(
            self._placement,
            topology,
            rank=self._group.rank,
            local_first=self.options.local_first,
            device=self._group.device,
        )
        # Ranks that plan compile the planner now, so that the first rebalance does not wait for it.
        if self.planner.policy == "ensemble" and (self.rank == 0 or self.options.planning == "sharded"):
            warmup()

    @property
    def placement(self) -> Placement:
        """The placement in force; its tables are on the CPU."""
        return self._placement

    @property
    def rank(self) -> int:
        """This rank within the group."""
        return self._group.rank

    def record(self, layer: int, expert_ids: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        """Count tokens per logical expert; see `LoadWindow.record`. Hot path: device work only."""
        self.window.record(layer, expert_ids, valid)

    def record_counts(self, layer: int, counts: torch.Tensor) -> None:
        """Add counts, integer [logical], tokens; see `LoadWindow.record_counts`."""
        self.window.record_counts(layer, counts)

    def physical(self, layer: int, expert_ids: torch.Tensor) -> torch.Tensor:
        """The slots to send tokens to; see `DispatchTables.physical`. Hot path: device work only."""
        return self.tables.physical(layer, expert_ids)

    def step(self, is_dummy: bool = False) -> RebalanceReport | None:
        """End a forward step. All ranks call it; every `interval` steps it rebalances and reports."""
        self.window.step(is_dummy)
        self._steps += 1
        if self.observer is not None:
            self.observer.stepped()
        if self._steps % self.options.interval:
            return None
        return self.rebalance()

    def rebalance(self) -> RebalanceReport:
        """Plan from the recorded window and switch over now. All ranks call it.

        A planner that fails on any rank leaves all ranks with the placement in force; the report says so.

        Raises:
            AgreementError: on all ranks, when they hold different plans; nothing was moved.
            TransferError: on all ranks, when weights could not be moved on one of them. Each layer has
                its old placement or its new one, alike on all ranks, and `placement` tells which.
        """
        try:
            report, interval_load = self._rebalance()
        except Exception:
            if self.observer is not None:
                self.observer.failed()
            raise
        self.reports.append(report)
        if self.observer is not None:
            self.observer.rebalanced(report, interval_load, self._placement, self.topology)
        return report

    def _rebalance(self) -> tuple[RebalanceReport, torch.Tensor]:
        """The report, and the load of the interval: [snapshots, layers, logical], tokens."""
        old = self._placement
        # Phase 1, all ranks: sum the interval over the group.
        start = time.perf_counter()
        interval_load = self._group.sum(self.window.take())
        self.window.push(interval_load)
        load = self.window.load()
        has_load = bool(load.any())
        gathered = time.perf_counter()

        # Phase 2, all ranks: plan, exchange, agree. Without load, all ranks know and none goes on.
        new, failure = self._plan(load) if has_load else (old, "")
        reason = failure if has_load else "no load was recorded"
        planned = time.perf_counter()

        # Phase 3, all ranks: move the weights, chunk by chunk of layers; each chunk is switched over
        # when every rank has what it needs.
        migration = plan_migration(old, new, self.topology)
        if not migration.layers.numel() and not reason:
            reason = f"no layer gains min_gain={self.planner.min_gain}"
        times = execute(
            migration,
            self._weights,
            self.topology,
            self._group,
            staging=self._staging,
            committed=lambda layers: self._switch(new, layers),
        )
        report = RebalanceReport(
            step=self._steps,
            skipped=not migration.layers.numel(),
            reason=reason,
            failed=bool(failure),
            balancedness_before=self._balancedness(interval_load, old),
            balancedness_after=self._balancedness(interval_load, new),
            layers=migration.layers.numel(),
            moves=migration.num_sends,
            bytes_moved=sum(self._weights.expert_bytes(layer) for layer in migration.sends.layer.tolist()),
            gather_seconds=gathered - start,
            plan_seconds=planned - gathered,
            transfer_seconds=times.transfer,
            commit_seconds=times.commit,
        )
        return report, interval_load

    def _plan(self, load: torch.Tensor) -> tuple[Placement, str]:
        """The placement to go to, the same on all ranks, and why it is the old one where planning failed."""
        layers, group = self._placement.num_layers, self._group
        leader = self.options.planning == "leader"
        share = layers if leader else -(-layers // group.size)
        first = min(group.rank * share, layers)
        last = min(first + share, layers)
        rows = torch.zeros(share, self.topology.num_slots, dtype=torch.int64, device=group.device)

        def work() -> None:
            if first < last:
                rows[: last - first] = self._plan_layers(load, first, last).to(group.device)

        failed = group.failures(try_action(work)[1])
        if failed:
            reason = "planning failed: " + "; ".join(f"rank {rank}: {text}" for rank, text in failed.items())
            if not self._told_failure:
                self._told_failure = True
                _logger.error("%s. The placement in force stays; later failures are only reported", reason)
            return self._placement, reason
        rows = group.broadcast(rows) if leader else group.all_gather(rows).flatten(0, 1)[:layers]
        rows = rows.cpu()
        group.agree("the plan", fingerprint(rows))
        return Placement(rows, self._placement.num_logical), ""

    def _plan_layers(self, load: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """int64 [last - first, slots]: the planned rows."""
        load = load[:, first:last]
        current = Placement(self._placement.physical_to_logical[first:last], self._placement.num_logical)
        return plan(load, self.topology, current, self.planner).placement.physical_to_logical.cpu()

    def _balancedness(self, interval_load: torch.Tensor, placement: Placement) -> float:
        if not interval_load.shape[0]:
            return 1.0
        return balancedness(interval_load, placement, self.topology)

    def _switch(self, new: Placement, layers: list[int]) -> None:
        """Put `layers` of the new placement in force, their weights being in place."""
        self._placement = self._placement.with_layers(torch.tensor(layers), new)
        self.tables.update(self._placement, layers)
