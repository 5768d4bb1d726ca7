"""Replay of one load under several policies, with the placements for the pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..config.options import PlannerOptions, RebalancerOptions
from ..core.balancedness import balancedness, rank_loads
from ..core.placement import Placement
from ..core.topology import Topology
from ..offline.dispatch_replay import has_whole_counts
from ..offline.simulation import DispatchResult, SimulationResult, policy_setup, simulate
from ..offline.traces import LoadTrace

__all__ = ["PolicyReplay", "Replay", "replay"]


@dataclass(frozen=True, eq=False)
class PolicyReplay:
    """The replay under one policy. The tuples have one entry for each of `result.intervals`.

    Attributes:
        result: scores.
        placements: placement in force in each interval.
        predicted: balancedness of that placement on the interval before, mean over its single steps; NaN
            without one.
    """

    result: SimulationResult
    placements: tuple[Placement, ...]
    predicted: tuple[float, ...]

    @property
    def balanced(self) -> DispatchResult | None:
        """The steps with dispatch `balanced`, each as one batch. None: the load holds no whole batches."""
        return next((item for item in self.result.dispatches if item.dispatch == "balanced"), None)

    def time(self, expert_cost: int) -> float:
        """Time of the experts at the slowest rank with the even split, 1 being that without any waiting.

        With an expert cost, it is the cost of the slowest rank.
        """
        even = next((item for item in self.result.dispatches if item.dispatch == "even"), None)
        return even.cost if expert_cost and even is not None else 1 / self.result.balancedness


@dataclass(frozen=True, eq=False)
class Replay:
    """One load, replayed under several policies.

    Attributes:
        trace: the load.
        topology: nodes, ranks, slots and groups.
        interval: steps between two rebalances.
        policies: the replay under each policy, in the order of the request.
        expert_cost: least cost of a replica in use, in tokens.
        message_us: assumed time of the message of dispatch `balanced`, in microseconds for each layer and
            batch; 0: none is needed.
        left_out: sentences on the files that a recording was read without.
    """

    trace: LoadTrace
    topology: Topology
    interval: int
    policies: tuple[PolicyReplay, ...]
    expert_cost: int = 0
    message_us: float = 0.0
    left_out: tuple[str, ...] = ()

    @property
    def unit(self) -> str:
        """What an axis of time counts."""
        steps = self.trace.engine_steps
        return "step" if steps == 1 else f"sum of {steps:.4g} steps"

    def mean_rank_loads(self, policy: PolicyReplay) -> torch.Tensor:
        """Load of each rank over all scored steps, relative to the mean of its layer.

        Returns:
            float64 [layers, ranks]; NaN for layers without load.
        """
        total = torch.zeros(self.trace.num_layers, self.topology.num_ranks, dtype=torch.float64)
        for interval, placement in zip(policy.result.intervals, policy.placements, strict=True):
            part = self.trace.load[interval.first_step : interval.first_step + interval.steps]
            total += rank_loads(part.sum(0, dtype=torch.float64), placement, self.topology)[0]
        return total / total.mean(1, keepdim=True)


def _before(trace: LoadTrace, result: SimulationResult, interval: int) -> list[torch.Tensor]:
    """The single steps of the interval before each rebalance; none where a recording has none."""
    starts = [part.first_step for part in result.intervals]
    return [trace.part(start - interval, start).single_steps for start in starts]


def replay(
    trace: LoadTrace,
    topology: Topology,
    policies: tuple[str, ...],
    planner: PlannerOptions,
    rebalancer: RebalancerOptions,
    *,
    expert_cost: int = 0,
    message_us: float = 0.0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Replay:
    """Replay `trace` under each of `policies`.

    Args:
        trace: the load.
        topology: nodes, ranks, slots and groups.
        policies: names of policies, as for `simulate`.
        planner: options of the planner.
        rebalancer: options of the window: interval, snapshots and history.
        expert_cost, message_us: see `Replay`.
        progress: called with (policy, rebalances done, rebalances in all).

    Raises:
        TraceError: a load that is too short for the interval. ConfigError: an unknown policy.
        TopologyError, PlacementError: the numbers do not fit together.
    """
    results = []
    dispatches = ("even", "balanced") if has_whole_counts(trace.single_steps) else ()
    for name in policies:
        result = simulate(
            trace,
            topology,
            policy_setup(name, planner),
            rebalancer.interval,
            snapshots=rebalancer.snapshots,
            history=rebalancer.history,
            dispatches=dispatches,
            expert_cost=expert_cost,
            progress=None if progress is None else lambda done, total, name=name: progress(name, done, total),  # type: ignore[misc]
        )
        placements = tuple(part.placement for part in result.intervals)
        predicted = tuple(
            balancedness(steps, placement, topology) if len(steps) else math.nan
            for steps, placement in zip(_before(trace, result, rebalancer.interval), placements, strict=True)
        )
        results.append(PolicyReplay(result, placements, predicted))
    return Replay(trace, topology, rebalancer.interval, tuple(results), expert_cost, message_us)
