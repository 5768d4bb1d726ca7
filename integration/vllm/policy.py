"""The object that vLLM asks for a map in place of its own policy: it always answers with a valid one."""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ...core.errors import AgreementError, LoadError
from ...core.placement import Placement
from ...core.topology import Topology
from ...observability.prometheus import Telemetry
from ...planning.planner import plan
from ...runtime.control.rank_group import fingerprint
from ..common.options import EngineOptions
from ..common.planner import EnginePlanner, EngineReport

__all__ = ["Interval", "VllmPolicy"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Interval:
    """What one rearrangement of one model starts from.

    Attributes:
        model: the name that vLLM gives it.
        load: int64 [snapshots, layers, logical] on the CPU, tokens summed over the ranks, in time order.
        failures: int64 [1] on the CPU, how many ranks had no load to add.
        ready: waits until these have arrived from the device.
        error: why this rank had none, else None.
        expert_bytes: gives the bytes of an expert's weights, by layer; None where that is not known.
    """

    model: str
    load: torch.Tensor
    failures: torch.Tensor | None = None
    ready: Callable[[], object] = lambda: None
    error: Exception | None = None
    expert_bytes: Callable[[], Mapping[int, int]] | None = None


class VllmPolicy:
    """Answers vLLM's calls of `policy.rebalance_experts`, in its synchronous and its asynchronous mode.

    vLLM hands its policy no more than one summed load. The snapshots come by `expect`, called by all ranks
    before vLLM rearranges; calls without them are vLLM's profiling run, or use the summed load.

    Args:
        options: of the planner and its window.
        own: vLLM's own policy, for what is not ours: elastic scaling of the group.
        group: the group whose ranks compare their plans, asked for at each call; runs collectives on CPU
            tensors. None: nothing is compared.
        speaks: whether this rank writes the log line of each rebalance.

    Attributes:
        planners: by model.
        telemetry: where this rank shows what happens, or None.
    """

    def __init__(
        self,
        options: EngineOptions,
        own: Any,
        group: Callable[[], dist.ProcessGroup] | None = None,
        speaks: bool = True,
    ) -> None:
        self.options = options
        self.own = own
        self.planners: dict[str, EnginePlanner] = {}
        self.telemetry: Telemetry | None = None
        self._group = group if options.check_agreement else None
        self._speaks = speaks
        self._expected: deque[Interval] = deque()
        self._profiling = False
        self._scaling = False
        self._told: set[str] = set()

    def expect(self, intervals: Sequence[Interval]) -> None:
        """Announce the calls of a rearrangement, one for each model, in the order that vLLM makes them."""
        self._expected = deque(intervals)
        self._profiling = self._scaling = False

    def expect_profiling(self) -> None:
        """Announce calls that vLLM makes to measure memory: the map in force answers them."""
        self._expected.clear()
        self._profiling, self._scaling = True, False

    def expect_scaling(self) -> None:
        """Announce that the group of ranks changes: vLLM's own policy answers, and the history is dropped."""
        self._expected.clear()
        self._profiling, self._scaling = False, True
        for planner in self.planners.values():
            planner.forget()

    def rebalance_experts(
        self,
        weight: torch.Tensor,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The signature of vLLM's policies. It writes to none of its inputs.

        Args:
            weight: [layers, logical], tokens.
            num_replicas: slots over all ranks.
            num_groups: groups of experts per layer.
            num_nodes: nodes.
            num_ranks: ranks.
            old_global_expert_indices: integer [layers, slots], the map in force.

        Returns:
            int64 [layers, slots] on the CPU, valid; the map in force where planning failed or gains little.
        """
        numbers = (num_replicas, num_groups, num_nodes, num_ranks)
        old = old_global_expert_indices
        if self._scaling or (old is not None and (old.shape[1] != num_replicas or bool((old < 0).any()))):
            result: torch.Tensor = self.own.rebalance_experts(weight, *numbers, old)
            return result
        if old is None:
            return self._from_scratch(weight, *numbers)
        if self._profiling:
            return old.to("cpu", torch.int64, copy=True)
        interval = self._expected.popleft() if self._expected else Interval("model", weight.unsqueeze(0))
        return self.rearrange(interval, old, *numbers)

    def rearrange(
        self,
        interval: Interval,
        old: torch.Tensor,
        num_slots: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
    ) -> torch.Tensor:
        """The map to go to, compared with the other ranks' before anyone acts on it. All ranks call it.

        Returns:
            int64 [layers, slots] on the CPU, in memory of its own.
        """
        planner = self.planners.setdefault(interval.model, EnginePlanner(self.options))
        planner.telemetry = None if self.telemetry is None else self.telemetry.of(interval.model)
        in_force = old.to("cpu", torch.int64, copy=True)
        ids, said = in_force, ""
        # What fails here must fail before the ranks meet below, or one would leave the others waiting.
        try:
            interval.ready()
            if interval.error is not None:
                raise interval.error
            if interval.failures is not None and bool(interval.failures):
                raise LoadError(f"{int(interval.failures)} of {num_ranks} ranks could not read their window")
            if bool(interval.load.any()):
                topology = Topology(
                    num_nodes=num_nodes,
                    num_ranks=num_ranks,
                    num_slots=num_slots,
                    num_groups=max(num_groups, 1),
                )
                current = Placement(in_force, interval.load.shape[2])
                planner.observe(interval.load)
                ids = planner.place(topology, current).physical_to_logical
                said = _describe(planner.reports[-1])
            else:
                said = "skipped, the window holds no load"
        except Exception as error:
            ids, said = in_force, self._failed(planner, error)
        if self._group is not None:
            try:
                _agree(ids, self._group())
            except Exception as error:
                ids, said = in_force, self._failed(planner, error)
                if planner.reports and not planner.reports[-1].skipped:
                    planner.reports[-1] = _withdrawn(planner.reports[-1], said)
        planner.conclude(interval.expert_bytes)
        if self._speaks:
            _logger.info("rebalance of %s: %s", interval.model, said)
        return ids.clone()

    def report(self) -> dict[str, Any]:
        """What happened so far, as plain data: for each model its failures and its latest reports."""
        return {
            "options": self.options.model_dump(mode="json"),
            "models": {
                model: {
                    "failures": planner.failures,
                    "reports": [dataclasses.asdict(report) for report in list(planner.reports)],
                }
                # Copies: in the asynchronous mode, another thread plans meanwhile.
                for model, planner in list(self.planners.items())
            },
        }

    def _from_scratch(
        self, weight: torch.Tensor, num_slots: int, num_groups: int, num_nodes: int, num_ranks: int
    ) -> torch.Tensor:
        """Without a map in force there is none to fall back on: what we cannot plan is vLLM's to answer."""
        try:
            topology = Topology(
                num_nodes=num_nodes, num_ranks=num_ranks, num_slots=num_slots, num_groups=max(num_groups, 1)
            )
            return plan(weight.cpu(), topology, options=self.options.planner).placement.physical_to_logical
        except Exception as error:
            _logger.error("no plan without a map in force: %s; vLLM's own policy answers", error)
            result: torch.Tensor = self.own.rebalance_experts(
                weight, num_slots, num_groups, num_nodes, num_ranks
            )
            return result

    def _failed(self, planner: EnginePlanner, error: Exception) -> str:
        """Count a failure and log it, once for each cause."""
        planner.failures += 1
        said = f"failed: {type(error).__name__}: {error}; the map in force stays"
        if said not in self._told:
            self._told.add(said)
            _logger.error("rebalance %s; this is said once", said, exc_info=error)
        return said


def _agree(ids: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Raise AgreementError, on all ranks, unless all hold the same map."""
    # Not a RankGroup: vLLM's groups for elastic scaling are unknown to torch's registry of ranks.
    mine = torch.tensor([fingerprint(ids)])
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(parts, mine, group=group)
    values = [int(part) for part in parts]
    if len(set(values)) > 1:
        # Without the hashes, so that it reads the same each time and is logged once.
        held = [[r for r, other in enumerate(values) if other == value] for value in dict.fromkeys(values)]
        described = ", another on ranks ".join(map(str, held))
        raise AgreementError(f"ranks planned different maps: one on ranks {described}")


def _withdrawn(report: EngineReport, reason: str) -> EngineReport:
    """The report of a plan that was not carried out."""
    return dataclasses.replace(
        report, skipped=True, reason=reason, predicted_after=report.predicted_before, layers=0, moves=0
    )


def _describe(report: EngineReport) -> str:
    if report.skipped:
        return f"skipped, {report.reason}; balancedness {report.observed:.3f} observed"
    return (
        f"balancedness {report.observed:.3f} observed, "
        f"{report.predicted_before:.3f} -> {report.predicted_after:.3f} predicted, "
        f"{report.moves} experts move in {report.layers} layers, "
        f"planned in {report.plan_seconds * 1000:.1f} ms"
    )
