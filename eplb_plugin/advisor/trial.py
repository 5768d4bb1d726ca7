"""One setting, tried on one load: what it brings on steps that planning has not seen, and what it moves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict

from ..config.options import PlannerOptions, RebalancerOptions
from ..core.placement import Placement
from ..core.topology import Topology
from ..offline.simulation import PolicySetup, policy_setup, simulate
from ..offline.traces import LoadTrace
from ..runtime.weights.migration import plan_migration

__all__ = ["Setting", "Trial", "try_setting"]


@dataclass(frozen=True)
class Setting:
    """What an operator can choose.

    Attributes:
        slots: physical experts over all ranks.
        interval: steps between two rebalances.
        move_price: `planner.move_price`.
    """

    slots: int
    interval: int
    move_price: float


class Trial(BaseModel):
    """What a setting came to. Sizes are in experts, so that nothing depends on how large one is."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    balancedness: float
    """Mean over the steps after the first interval."""

    rebalances: int
    """How many there were."""

    first_moves: int
    """Moves of the first rebalance, which leaves the placement that the engine starts with."""

    moves: float
    """Mean moves of each later rebalance; of the first one where it is the only one."""

    busiest_within: float
    """The same of the rank that sends or receives most within its node."""

    busiest_between: float
    """The same of the rank that sends or receives most to or from other nodes."""


def try_setting(
    trace: LoadTrace,
    topology: Topology,
    setting: Setting,
    planner: PlannerOptions,
    rebalancer: RebalancerOptions,
) -> Trial:
    """Replay `trace` with a setting.

    Args:
        trace: the load.
        topology: nodes, ranks and groups, with the slots of the setting.
        setting: interval and price replace those of the options.
        planner: how placements are planned.
        rebalancer: its snapshots and history are the window.

    Raises:
        TraceError: the load is too short for the interval.
    """
    options = planner.model_copy(update={"move_price": setting.move_price, "policy": "adaptive"})
    setup = policy_setup("adaptive", options)
    counts: list[tuple[int, int, int]] = []

    def watch(window: torch.Tensor, topology: Topology, current: Placement | None) -> Placement:
        assert current is not None
        placement = setup.policy(window, topology, current)
        counts.append(_transfers(current, placement, topology))
        return placement

    result = simulate(
        trace,
        topology,
        PolicySetup(setup.name, watch),
        setting.interval,
        snapshots=rebalancer.snapshots,
        history=rebalancer.history,
    )
    later = counts[1:] or counts
    return Trial(
        balancedness=result.balancedness,
        rebalances=len(counts),
        first_moves=counts[0][0],
        moves=sum(item[0] for item in later) / len(later),
        busiest_within=sum(item[1] for item in later) / len(later),
        busiest_between=sum(item[2] for item in later) / len(later),
    )


def _transfers(old: Placement, new: Placement, topology: Topology) -> tuple[int, int, int]:
    """Experts sent: in all, by or to the busiest rank within its node, and the same between nodes."""
    sends = plan_migration(old, new, topology).sends
    within = sends.source_rank // topology.ranks_per_node == sends.rank // topology.ranks_per_node

    def busiest(chosen: torch.Tensor) -> int:
        ends = (sends.source_rank[chosen], sends.rank[chosen])
        return max(int(torch.bincount(ranks, minlength=1).max()) for ranks in ends)

    return sends.rank.numel(), busiest(within), busiest(~within)
