"""Replaying a recorded load offline: what would a policy have gained, and what would it have moved?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch

from ..config.options import PlannerOptions
from ..core.balancedness import balancedness, count_moves
from ..core.errors import PlacementError, TraceError
from ..core.load import as_snapshots, fold_steps
from ..core.placement import Placement
from ..core.topology import Topology
from ..planning.planner import plan
from .traces import LoadTrace

__all__ = [
    "POLICIES",
    "IntervalResult",
    "Policy",
    "PolicySetup",
    "SimulationResult",
    "policy_setup",
    "simulate",
]


class Policy(Protocol):
    """Anything that plans. It is called once per interval, in time order."""

    def __call__(self, window: torch.Tensor, topology: Topology, current: Placement) -> Placement:
        """The placement for the next interval.

        Args:
            window: float64 [snapshots, layers, logical] in time order, tokens.
            topology: nodes, ranks, slots and groups.
            current: the placement in force.
        """


@dataclass(frozen=True)
class PolicySetup:
    """A policy and how much of the past it looks at.

    Attributes:
        name: what results are called by.
        policy: the callable that plans.
        snapshots: snapshots per interval; None takes what `simulate` was given.
        history: intervals of the window; None takes what `simulate` was given.
    """

    name: str
    policy: Policy
    snapshots: int | None = None
    history: int | None = None


@dataclass(frozen=True)
class IntervalResult:
    """What one rebalance brought.

    Attributes:
        first_step: first step that the new placement was in force.
        steps: steps until the next rebalance, or the end of the trace.
        balancedness: mean over those steps.
        predicted: balancedness of the new placement on the window that it was planned from.
        moves: transfers of one expert's weights to one rank.
        plan_ms: time that planning took, in milliseconds.
    """

    first_step: int
    steps: int
    balancedness: float
    predicted: float
    moves: int
    plan_ms: float


@dataclass(frozen=True)
class SimulationResult:
    """What a policy did to a trace.

    Attributes:
        policy: its name.
        balancedness: mean over all steps after the first interval.
        moved_share: mean over the rebalances of moves / (layers * slots).
        plan_ms: median time to plan, in milliseconds.
        intervals: one entry per rebalance.
    """

    policy: str
    balancedness: float
    moved_share: float
    plan_ms: float
    intervals: tuple[IntervalResult, ...]


def simulate(
    trace: LoadTrace,
    topology: Topology,
    policy: str | PolicySetup,
    interval: int,
    *,
    snapshots: int = 32,
    history: int = 4,
    planner: PlannerOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SimulationResult:
    """Rebalance every `interval` steps of `trace` and score each placement on the steps that follow it.

    The first interval runs on the default placement and is not scored, so that all policies are compared
    on the same steps. The last interval may be shorter than the others.

    Args:
        trace: the load of every step.
        topology: nodes, ranks, slots and groups.
        policy: a name of `POLICIES`, or a policy of one's own.
        interval: steps between two rebalances.
        snapshots: snapshots that each interval is folded into, at most.
        history: intervals that the window spans, at most.
        planner: options of the planner, for the policies of that name.
        progress: called with (rebalances done, rebalances in all) after each.

    Raises:
        TraceError: the trace is not longer than one interval, a number is below 1, or there is no policy of
            that name. TopologyError: more experts than slots. PlacementError: the policy returned a
            placement that does not fit.
    """
    for name, value in (("interval", interval), ("snapshots", snapshots), ("history", history)):
        if value < 1:
            raise TraceError(f"{name}={value} is below 1")
    if trace.num_steps <= interval:
        raise TraceError(
            f"{trace.name} has {trace.num_steps} steps: with interval={interval} none are left to score"
        )
    setup = policy_setup(policy, planner) if isinstance(policy, str) else policy
    snapshots = setup.snapshots or snapshots
    history = setup.history or history

    current = Placement.default(trace.num_layers, trace.num_experts, topology.num_slots)
    past: list[torch.Tensor] = []
    results: list[IntervalResult] = []
    starts = range(interval, trace.num_steps, interval)
    for start in starts:
        past = [*past, fold_steps(trace.load[start - interval : start], snapshots)][-history:]
        window = as_snapshots(torch.cat(past))
        began = time.perf_counter()
        placement = setup.policy(window, topology, current)
        seconds = time.perf_counter() - began
        _check_shape(setup.name, placement, current)
        ahead = trace.load[start : start + interval]
        results.append(
            IntervalResult(
                first_step=start,
                steps=ahead.shape[0],
                balancedness=balancedness(ahead, placement, topology),
                predicted=balancedness(window, placement, topology),
                moves=int(count_moves(current, placement, topology).sum()),
                plan_ms=1000 * seconds,
            )
        )
        current = placement
        if progress is not None:
            progress(len(results), len(starts))
    scored = sum(item.steps for item in results)
    cells = trace.num_layers * topology.num_slots
    return SimulationResult(
        policy=setup.name,
        balancedness=sum(item.balancedness * item.steps for item in results) / scored,
        moved_share=statistics.fmean(item.moves / cells for item in results),
        plan_ms=statistics.median(item.plan_ms for item in results),
        intervals=tuple(results),
    )


def policy_setup(name: str, planner: PlannerOptions | None = None) -> PolicySetup:
    """The policy called `name`, with the options of the planner.

    Raises:
        TraceError: there is none; the message lists them.
    """
    try:
        make = POLICIES[name]
    except KeyError:
        raise TraceError(f"no policy {name!r}; there are {', '.join(POLICIES)}") from None
    return make(planner or PlannerOptions())


def _static(options: PlannerOptions) -> PolicySetup:
    """The placement that engines start from, for ever."""

    def keep(window: torch.Tensor, topology: Topology, current: Placement) -> Placement:
        return current

    return PolicySetup("static", keep)


def _greedy(options: PlannerOptions) -> PolicySetup:
    """What engines do today: plan from the summed load of the last interval, whatever is in force."""
    options = options.model_copy(update={"policy": "greedy"})

    def forget(window: torch.Tensor, topology: Topology, current: Placement) -> Placement:
        return plan(window.sum(0), topology, None, options).placement

    return PolicySetup("greedy", forget, snapshots=1, history=1)


def _ensemble(options: PlannerOptions) -> PolicySetup:
    """What the online loop does: plan from the whole window, starting from the placement in force."""
    options = options.model_copy(update={"policy": "ensemble"})

    def follow(window: torch.Tensor, topology: Topology, current: Placement) -> Placement:
        return plan(window, topology, current, options).placement

    return PolicySetup("ensemble", follow)


POLICIES: Mapping[str, Callable[[PlannerOptions], PolicySetup]] = MappingProxyType(
    {"static": _static, "greedy": _greedy, "ensemble": _ensemble}
)
"""The policies that have a name; each entry takes the options of the planner."""


def _check_shape(name: str, placement: Placement, current: Placement) -> None:
    if (
        placement.physical_to_logical.shape != current.physical_to_logical.shape
        or placement.num_logical != current.num_logical
    ):
        raise PlacementError(f"policy {name!r} returned {placement} in place of {current}")
