"""The sweep: which setting is best on the first half of a load, and does it hold on the second?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..config.options import PlannerOptions, RebalancerOptions
from ..core.balancedness import balancedness
from ..core.errors import TraceError
from ..core.placement import Placement
from ..offline.traces import LoadTrace
from .cache import TrialCache
from .machine import Cost, Machine
from .trial import Setting, Trial, try_setting

__all__ = ["LEAST_STEPS", "Advice", "BackTest", "Rated", "advise", "busy_layers", "similarity"]

LEAST_STEPS = 16
"""Steps that a load needs to be split and still have something to plan from and to score."""

SAFE_ERROR = 0.02
"""Difference between predicted and measured balancedness up to which a prediction counts as safe."""

SAFE_SIMILARITY = 0.8
"""Correlation of the two halves' loads above which the mix of traffic counts as the same."""

# What more replicas have to bring, and what more moves, to be preferred.
_WORTH_MEMORY = 0.02
_WORTH_MOVES = 0.005
_REDUNDANT_PER_RANK = (0, 1, 2, 4)
_INTERVALS_PER_HALF = (16, 8, 4)
_PRICES = (0.25, 4.0)


@dataclass(frozen=True)
class Rated:
    """A setting, and what it means for a model on a machine.

    Attributes:
        setting: slots, interval and price.
        trial: what it came to on the first half.
        speedup: of the MoE layers against never rebalancing, no redundant experts: they take as long as
            their fullest rank.
        cost: of moves and replicas.
        net: the speed-up as if the engine stood still while weights move.
    """

    setting: Setting
    trial: Trial
    speedup: float
    cost: Cost
    net: float


@dataclass(frozen=True)
class BackTest:
    """Whether the prediction held.

    Attributes:
        predicted: balancedness of the best setting on the first half.
        measured: on the second half, replayed in the same way.
        static: on the second half, never rebalanced.
        similarity: of the two halves' loads: the median over layers of their correlation over experts.
    """

    predicted: float
    measured: float
    static: float
    similarity: float

    @property
    def same_traffic(self) -> bool:
        return self.similarity >= SAFE_SIMILARITY

    @property
    def safe(self) -> bool:
        """Whether the prediction may be trusted for traffic that is still to come."""
        return self.same_traffic and abs(self.predicted - self.measured) <= SAFE_ERROR


@dataclass(frozen=True)
class Advice:
    """What to do.

    Attributes:
        static: balancedness of the first half when nothing is ever rebalanced, without redundant experts.
        rated: every setting tried, in the order tried.
        best: one of them.
        back_test: how the best one does on the second half.
        cached: trials that had been made before.
    """

    static: float
    rated: tuple[Rated, ...]
    best: Rated
    back_test: BackTest
    cached: int


def advise(
    trace: LoadTrace,
    machine: Machine,
    planner: PlannerOptions,
    rebalancer: RebalancerOptions,
    *,
    redundant: Sequence[int] = (),
    intervals: Sequence[int] = (),
    prices: Sequence[float] = (),
    cache: TrialCache | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Advice:
    """Sweep redundant experts and intervals, then prices at the best of them, then test the best one.

    Args:
        trace: the load; its first half is swept, its second half tests.
        machine: ranks, links and the size of an expert.
        planner: how placements are planned.
        rebalancer: its snapshots and history are the window.
        redundant: redundant experts to try; by default none (or what it takes to divide evenly), and one,
            two and four more per rank, up to half of the experts.
        intervals: steps between rebalances to try; by default three that fit the load.
        prices: of moves to try; by default that of `planner`, a quarter and four times of it.
        cache: trials made before.
        progress: told the trials done and the trials in all.

    Raises:
        TraceError: the load is too short, or half of it for an interval; or half of it has no tokens.
        TopologyError: the numbers do not fit together.
    """
    cache = cache or TrialCache(None)
    half = trace.num_steps // 2
    if trace.num_steps < LEAST_STEPS:
        raise TraceError(f"{trace.name} has {trace.num_steps} steps; advice needs {LEAST_STEPS} at least")
    first, second = (_part(trace, part) for part in (slice(0, half), slice(half, None)))
    for name, part in (("first", first), ("second", second)):
        if not bool(part.load.any()):
            raise TraceError(f"{trace.name}: its {name} half, {part.num_steps} steps, has no tokens")
    slots = [trace.num_experts + extra for extra in redundant or _redundant(trace.num_experts, machine.ranks)]
    steps = list(intervals) or sorted({max(1, half // parts) for parts in _INTERVALS_PER_HALF})
    if max(steps) >= half:
        raise TraceError(
            f"{trace.name} has {trace.num_steps} steps; with an interval of {max(steps)} none are left to "
            f"score of the {half} in a half, on which settings are tried"
        )
    asked = list(prices) or [planner.move_price, *(planner.move_price * x for x in _PRICES)]
    price, *more_prices = dict.fromkeys(asked)
    for count in slots:
        machine.topology(count).check_experts(trace.num_experts)
    done, total = 0, len(slots) * len(steps) + len(more_prices) + 1

    def attempt(load: LoadTrace, setting: Setting) -> Trial:
        nonlocal done
        topology = machine.topology(setting.slots)
        key = cache.key(load, topology, setting, planner, rebalancer)
        trial = cache.get(key)
        if trial is None:
            trial = try_setting(load, topology, setting, planner, rebalancer)
            cache.put(key, trial)
        done += 1
        if progress is not None:
            progress(done, total)
        return trial

    static = _static(first, machine)

    def rate(setting: Setting) -> Rated:
        trial = attempt(first, setting)
        cost = machine.cost(trial, setting, trace.num_experts, busy_layers(trace))
        speedup = trial.balancedness / static
        return Rated(setting, trial, speedup, cost, speedup * max(0.0, 1 - cost.transfer_share))

    rated = [rate(Setting(count, interval, price)) for count in slots for interval in steps]
    best = _best(rated)
    rated += [rate(Setting(best.setting.slots, best.setting.interval, other)) for other in more_prices]
    best = _best(rated)
    test = BackTest(
        predicted=best.trial.balancedness,
        measured=attempt(second, best.setting).balancedness,
        static=_static(second, machine),
        similarity=similarity(first.load, second.load),
    )
    return Advice(static, tuple(rated), best, test, cache.hits)


def similarity(one: torch.Tensor, other: torch.Tensor) -> float:
    """How alike two loads are: the median over layers of the correlation over experts of their sums.

    Args:
        one, other: [steps, layers, logical], tokens.

    Returns:
        1 for the same proportions; about 0 for unrelated kinds of traffic. Layers where an expert is no
        different from another, or without load, do not count; 1 if none does.
    """
    rows = torch.stack([load.sum(0, dtype=torch.float64) for load in (one, other)])
    rows = rows - rows.mean(2, keepdim=True)
    scale = rows.square().sum(2).sqrt()
    usable = (scale > 1e-9).all(0)
    if not bool(usable.any()):
        return 1.0
    return float(((rows[0] * rows[1]).sum(1) / (scale[0] * scale[1]))[usable].median())


def busy_layers(trace: LoadTrace) -> int:
    """Layers with experts: engines record dense layers as rows of zeros."""
    return int((trace.load != 0).any(2).any(0).sum())


def _part(trace: LoadTrace, steps: slice) -> LoadTrace:
    return LoadTrace(trace.load[steps].contiguous(), trace.name, trace.layer_ids)


def _redundant(experts: int, ranks: int) -> list[int]:
    even = -(-experts // ranks) * ranks - experts
    # Half as many slots again as there are experts is more than anybody spends memory on.
    return [
        even + extra * ranks for extra in _REDUNDANT_PER_RANK if extra == 0 or 2 * extra * ranks <= experts
    ]


def _static(trace: LoadTrace, machine: Machine) -> float:
    slots = -(-trace.num_experts // machine.ranks) * machine.ranks
    placement = Placement.default(trace.num_layers, trace.num_experts, slots)
    return balancedness(trace.load, placement, machine.topology(slots))


def _best(rated: Sequence[Rated]) -> Rated:
    """Fewer slots unless more of them pay, then fewer moves unless more of them do."""
    top = max(item.net for item in rated)
    slots = min(item.setting.slots for item in rated if item.net >= top * (1 - _WORTH_MEMORY))
    rest = [item for item in rated if item.setting.slots == slots]
    top = max(item.net for item in rest)
    good = [item for item in rest if item.net >= top * (1 - _WORTH_MOVES)]
    return min(good, key=lambda item: (item.cost.bytes_per_hour, -item.net))
