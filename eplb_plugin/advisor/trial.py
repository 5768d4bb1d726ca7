"""Trial of one setting on one load: balancedness on the steps after each plan, and moves."""

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
    """The choices of an operator.

    Attributes:
        slots: physical experts over all ranks.
        interval: steps between two rebalances.
        move_price: `planner.move_price`.
    """

    slots: int
    interval: int
    move_price: float


class Trial(BaseModel):
    """The result of a setting. Transfers are counted in experts: the cache serves experts of any size."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    balancedness: float
    """Mean over the steps after the first interval."""

    rebalances: int
    """Number of rebalances."""

    first_moves: int
    """Moves of the first rebalance, from the engine's default placement."""

    moves: float
    """Mean moves of the later rebalances, or the moves of a single rebalance."""

    busiest_within: float
    """Mean transfers within the node of the rank with the most, over the same rebalances."""

    busiest_between: float
    """Mean transfers between nodes of the rank with the most."""


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
        setting: its interval and price replace the options.
        planner: options of the planner.
        rebalancer: options of the window: snapshots and history.

    Raises:
        TraceError: the load has at most one interval.
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
    """Number of transfers: in all, of the busiest rank within its node, of the busiest rank between nodes."""
    sends = plan_migration(old, new, topology).sends
    within = sends.source_rank // topology.ranks_per_node == sends.rank // topology.ranks_per_node

    def busiest(chosen: torch.Tensor) -> int:
        ends = (sends.source_rank[chosen], sends.rank[chosen])
        return max(int(torch.bincount(ranks, minlength=1).max()) for ranks in ends)

    return sends.rank.numel(), busiest(within), busiest(~within)
