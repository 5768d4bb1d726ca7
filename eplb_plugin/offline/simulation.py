"""Simulation: a recorded load, replayed offline under a policy, with its balancedness and its moves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from ..config.options import PlannerOptions, RebalancerOptions
from ..core.balancedness import balancedness, count_moves
from ..core.errors import ConfigError, PlacementError, TraceError, checked_integer
from ..core.load import as_snapshots, fold_steps
from ..core.placement import Placement
from ..core.topology import Topology
from ..planning.planner import plan
from ..planning.policies import POLICIES as PLANNER_POLICIES
from .dispatch_replay import BatchScore, find_split, score, whole_counts
from .traces import LoadTrace

__all__ = [
    "POLICIES",
    "DispatchResult",
    "IntervalResult",
    "PolicySetup",
    "SimulationResult",
    "policy_setup",
    "simulate",
]

_SAMPLES = RebalancerOptions().samples


@dataclass(frozen=True)
class PolicySetup:
    """A policy and the window that it plans from.

    Attributes:
        name: the name of its results.
        policy: called once per interval, in time order, with the recorded window and the placement in force.
        snapshots: snapshots per interval; None takes what `simulate` was given.
        history: intervals of the window; None takes what `simulate` was given.
        samples: single steps per interval that the policy gets as the keyword `samples`; 0: it takes none.
    """

    name: str
    policy: Callable[..., Placement]
    snapshots: int | None = None
    history: int | None = None
    samples: int = 0


@dataclass(frozen=True)
class IntervalResult:
    """One rebalance and the steps after it.

    Attributes:
        first_step: first step with the new placement in force.
        steps: steps until the next rebalance, or the end of the trace.
        scored: the single steps among them: all, or the samples of a recording.
        balancedness: mean over the single steps.
        predicted: balancedness of the new placement on its window.
        moves: transfers of one expert's weights to one rank.
        plan_ms: planning time, in milliseconds.
        placement: in force for these steps.
    """

    first_step: int
    steps: int
    scored: int
    balancedness: float
    predicted: float
    moves: int
    plan_ms: float
    placement: Placement = field(repr=False, compare=False)


@dataclass(frozen=True)
class DispatchResult:
    """The steps of a trace under a policy, each as one batch, with one of its dispatches.

    Attributes:
        dispatch: its name.
        balancedness: mean over all steps after the first interval.
        cost: cost of the slowest rank / mean load of a rank, both summed over steps and layers. It is
            the time of the MoE layers; 1 is the time of tokens spread evenly over all ranks.
        cost_ratio: `cost` over that of the even split.
        intervals: balancedness of each interval.
    """

    dispatch: str
    balancedness: float
    cost: float
    cost_ratio: float
    intervals: tuple[float, ...]


@dataclass(frozen=True)
class SimulationResult:
    """A trace under a policy.

    Attributes:
        policy: its name.
        balancedness: mean over all steps after the first interval.
        moved_share: mean over the rebalances of moves / (layers * slots).
        plan_ms: median planning time, in milliseconds.
        intervals: one entry per rebalance.
        dispatches: one entry for each dispatch that was asked for.
    """

    policy: str
    balancedness: float
    moved_share: float
    plan_ms: float
    intervals: tuple[IntervalResult, ...]
    dispatches: tuple[DispatchResult, ...] = ()


def simulate(
    trace: LoadTrace,
    topology: Topology,
    policy: str | PolicySetup,
    interval: int,
    *,
    snapshots: int = 32,
    history: int = 4,
    planner: PlannerOptions | None = None,
    dispatches: Sequence[str] = (),
    expert_cost: int = 0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> SimulationResult:
    """Rebalance every `interval` steps of `trace` and score each placement on the steps that follow it.

    The first interval runs on the default placement and is not scored: all policies are compared on the same
    steps. The last interval may be shorter than the others.

    Args:
        policy: a name of `POLICIES`, or a policy of your own.
        interval: steps between two rebalances.
        snapshots: snapshots that each interval is folded into, at most.
        history: intervals that the window spans, at most.
        planner: options of the planner, for policies given by name.
        dispatches: names of `dispatch_replay.SPLITS`, to be judged on each step as one batch. Without
            any, balancedness is that of the even split alone.
        expert_cost: for dispatches: least cost of a replica in use, in tokens.
        seed: of the dispatch `sampled`.
        progress: called with (rebalances done, rebalances in all) after each.

    Raises:
        TraceError: the trace is not longer than one interval, a number is below 1, or a dispatch is given for
            loads in fractions of tokens. ConfigError: an unknown policy or dispatch. TopologyError: more
            experts than slots. PlacementError: the placement of the policy does not fit.
    """
    for name, value in (("interval", interval), ("snapshots", snapshots), ("history", history)):
        checked_integer(name, value, TraceError)
    if trace.num_steps <= interval:
        raise TraceError(
            f"{trace.name} has {trace.num_steps} steps: with interval={interval} none are left to score"
        )
    setup = policy_setup(policy, planner) if isinstance(policy, str) else policy
    snapshots, history = setup.snapshots or snapshots, setup.history or history
    names = list(dict.fromkeys(dispatches))
    for name in names:
        find_split(name)
    if names:
        whole_counts(trace.single_steps, trace.name)  # an error before the first plan
    # Costs are told as a ratio to those of the even split.
    judged = ["even", *(name for name in names if name != "even")] if names else []
    scores: dict[str, list[BatchScore]] = {name: [] for name in judged}
    current = Placement.default(trace.num_layers, trace.num_experts, topology.num_slots)
    past: list[torch.Tensor] = []
    single: list[torch.Tensor] = []
    results: list[IntervalResult] = []
    starts = range(interval, trace.num_steps, interval)
    for start in starts:
        past = [*past, fold_steps(trace.load[start - interval : start], snapshots)][-history:]
        window = as_snapshots(torch.cat(past))
        samples = {}
        if setup.samples:
            recent = trace.part(start - interval, start).single_steps
            single = [*single, _evenly_spaced(recent, setup.samples)][-history:]
            samples["samples"] = torch.cat(single)
        began = time.perf_counter()
        placement = setup.policy(window, topology, current, **samples)
        seconds = time.perf_counter() - began
        ids, in_force = placement.physical_to_logical, current.physical_to_logical
        if (placement.num_logical, ids.shape) != (current.num_logical, in_force.shape):
            raise PlacementError(f"policy {setup.name!r} returned {placement} in place of {current}")
        steps = min(interval, trace.num_steps - start)
        ahead = trace.part(start, start + interval).single_steps
        results.append(
            IntervalResult(
                first_step=start,
                steps=steps,
                scored=ahead.shape[0],
                # A recording may have no single step in a short interval: it has no weight then.
                balancedness=balancedness(ahead, placement, topology) if len(ahead) else 1.0,
                predicted=balancedness(window, placement, topology),
                moves=int(count_moves(current, placement, topology).sum()),
                plan_ms=1000 * seconds,
                placement=placement,
            )
        )
        for name, found in scores.items():
            if not len(ahead):
                found.append(BatchScore(1.0, 0, 0.0))
                continue
            counts = whole_counts(ahead, trace.name)
            found.append(
                score(name, counts, placement, topology, expert_cost=expert_cost, seed=(seed, start))
            )
        current = placement
        if progress is not None:
            progress(len(results), len(starts))
    scored = sum(item.scored for item in results)
    if not scored:
        raise TraceError(f"{trace.name}: has no single steps after the first interval of {interval} to score")
    slots = trace.num_layers * topology.num_slots
    return SimulationResult(
        policy=setup.name,
        balancedness=sum(item.balancedness * item.scored for item in results) / scored,
        moved_share=statistics.fmean(item.moves / slots for item in results),
        plan_ms=statistics.median(item.plan_ms for item in results),
        intervals=tuple(results),
        dispatches=tuple(_dispatch_result(name, scores, results) for name in names),
    )


def _evenly_spaced(load: torch.Tensor, samples: int) -> torch.Tensor:
    """At most `samples` steps of an interval, as the load window keeps them."""
    count = min(samples, len(load))
    return load[torch.arange(count) * len(load) // count]


def _dispatch_result(
    name: str, scores: Mapping[str, list[BatchScore]], intervals: list[IntervalResult]
) -> DispatchResult:
    """The mean over the intervals, each with the weight of its steps; `scores` are those of the intervals."""
    each = [item.balancedness for item in scores[name]]
    steps = [item.scored for item in intervals]
    cost, even = (sum(item.peak_cost for item in scores[key]) for key in (name, "even"))
    load = sum(item.mean_load for item in scores[name])
    return DispatchResult(
        dispatch=name,
        balancedness=sum(a * b for a, b in zip(each, steps, strict=True)) / sum(steps),
        cost=cost / load if load else 1.0,
        cost_ratio=cost / even if even else 1.0,
        intervals=tuple(each),
    )


def policy_setup(name: str, planner: PlannerOptions | None = None) -> PolicySetup:
    """The policy called `name`, with the options of the planner.

    Policies that plan from scratch ignore `max_moves`, so that one configuration serves a comparison.

    Raises:
        ConfigError: there is none; the message lists them.
    """
    if name not in POLICIES:
        raise ConfigError(f"no policy {name!r}; there are {', '.join(POLICIES)}")
    return POLICIES[name](name, planner or PlannerOptions())


def _static(name: str, options: PlannerOptions) -> PolicySetup:
    """The placement that engines start from, for ever."""

    def keep(window: torch.Tensor, topology: Topology, current: Placement | None) -> Placement:
        return current or Placement.default(window.shape[1], window.shape[2], topology.num_slots)

    return PolicySetup(name, keep)


def _as_engines_do(name: str, options: PlannerOptions) -> PolicySetup:
    """Plan from the summed load of the last interval, whatever is in force."""
    options = options.model_copy(update={"policy": name, "max_moves": None})

    def forget(window: torch.Tensor, topology: Topology, current: Placement | None) -> Placement:
        return plan(window.sum(0), topology, None, options).placement

    return PolicySetup(name, forget, snapshots=1, history=1)


def _as_the_online_loop_does(name: str, options: PlannerOptions) -> PolicySetup:
    """Plan from the whole window and the placement in force."""
    bound = options.max_moves if PLANNER_POLICIES[name].keeps_max_moves else None
    options = options.model_copy(update={"policy": name, "max_moves": bound})

    def follow(
        window: torch.Tensor,
        topology: Topology,
        current: Placement | None,
        samples: torch.Tensor | None = None,
    ) -> Placement:
        return plan(window, topology, current, options, samples=samples).placement

    return PolicySetup(name, follow, samples=_SAMPLES if options.dispatch == "balanced" else 0)


POLICIES: Mapping[str, Callable[[str, PlannerOptions], PolicySetup]] = MappingProxyType(
    {"static": _static, **dict.fromkeys(PLANNER_POLICIES, _as_the_online_loop_does), "greedy": _as_engines_do}
)
"""The policies of the planner, and `static`, by their names."""
