"""The best setting on the first half of a load, back-tested on the second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..config.options import PlannerOptions, RebalancerOptions
from ..core.errors import TraceError
from ..offline.traces import LoadTrace
from .dispatch import DispatchGain, dispatch_gain
from .machine import Cost, Machine
from .trial import Setting, Trial, TrialCache, try_setting, unmoved

__all__ = [
    "LEAST_STEPS",
    "SAFE_SIMILARITY",
    "WORTH_MEMORY",
    "Advice",
    "BackTest",
    "Rated",
    "advise",
    "busy_layers",
    "mean_rank_load",
    "similarity",
]

LEAST_STEPS = 16
"""Minimum number of steps of a load: both halves need steps to plan from and steps to score."""

SAFE_ERROR = 0.02
"""Maximum difference between predicted and measured balancedness of a safe prediction."""

SAFE_SIMILARITY = 0.8
"""Minimum correlation between the loads of the two halves for the same mix of traffic."""

WORTH_MEMORY = 0.02
"""Minimum relative gain of a setting with more slots."""

_WORTH_MOVES = 0.005  # minimum relative gain of a setting with more moves
_REDUNDANT_PER_RANK = (0, 1, 2, 4)
_INTERVALS_PER_HALF = (16, 8, 4)
_PRICES = (0.25, 4.0)
_MOST_PLANS = 500  # of layers, for dispatch `balanced`


@dataclass(frozen=True)
class Rated:
    """A setting with its gain and cost for a model on a machine.

    Attributes:
        setting: slots, interval and price.
        trial: its trial on the first half.
        speedup: of the MoE layers, over no rebalancing and no redundant experts. The time of a layer is the
            peak rank load; with an expert cost, the cost of the slowest rank.
        cost: cost of moves and replicas.
        net: `speedup` if the engine stopped during transfers: a lower bound, and the figure that people see.
        dispatched: `net` with dispatch `balanced`, and with its message if the time of a token is known.
            None: not judged.
    """

    setting: Setting
    trial: Trial
    speedup: float
    cost: Cost
    net: float
    dispatched: float | None = None


@dataclass(frozen=True)
class BackTest:
    """The best setting of the first half, on the second half.

    Attributes:
        predicted: balancedness of the best setting on the first half.
        measured: balancedness of the same setting on the second half.
        static: balancedness of the second half without rebalancing.
        similarity: correlation over experts between the loads of the halves, median over layers.
        speedup: of the MoE layers on the second half, over no rebalancing.
    """

    predicted: float
    measured: float
    static: float
    similarity: float
    speedup: float

    @property
    def same_traffic(self) -> bool:
        return self.similarity >= SAFE_SIMILARITY

    @property
    def safe(self) -> bool:
        """Whether the prediction is reliable for future traffic."""
        return self.same_traffic and abs(self.predicted - self.measured) <= SAFE_ERROR


@dataclass(frozen=True)
class Advice:
    """The result of the sweep.

    Attributes:
        static: balancedness of the first half without rebalancing and redundant experts.
        rated: all settings, in order of trial.
        best: the recommended one of them.
        back_test: the best setting on the second half.
        cached: number of trials from the cache.
        dispatch: what dispatch `balanced` adds to the best setting. None: not judged.
        message_left_out: whether its message is missing in `Rated.dispatched`, since the time of a token is
            unknown.
        planned: `Rated.dispatched` of the best setting with plans made for dispatch `balanced`. None: not
            tried.
        rank_load: mean load of a rank in one layer and one step, in tokens.
        engine_steps: steps of the engine in one step of the load.
    """

    static: float
    rated: tuple[Rated, ...]
    best: Rated
    back_test: BackTest
    cached: int
    dispatch: DispatchGain | None = None
    message_left_out: bool = False
    planned: float | None = None
    rank_load: float = 0.0
    engine_steps: float = 1.0

    def engine_interval(self, setting: Setting) -> int:
        """The interval of a setting in steps of the engine."""
        return max(1, round(setting.interval * self.engine_steps))


def advise(
    trace: LoadTrace,
    machine: Machine,
    planner: PlannerOptions,
    rebalancer: RebalancerOptions,
    *,
    redundant: Sequence[int] = (),
    intervals: Sequence[int] = (),
    prices: Sequence[float | Literal["auto"]] = (),
    cache: TrialCache | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Advice:
    """Sweep redundant experts and intervals, then the price of moves, and back-test the best setting.

    Args:
        trace: the load. Settings are tried on its first half; the second half is the back-test.
        machine: ranks, links, the size of an expert and its cost.
        planner: options of the planner.
        rebalancer: options of the window: snapshots and history.
        redundant: numbers of redundant experts. By default 0, 1, 2 and 4 per rank, at most half as many as
            experts, each rounded up to slots that the ranks divide.
        intervals: steps between rebalances; by default a 16th, an 8th and a quarter of a half.
        prices: prices of a move; by default the price of `planner`, times 1, 1/4 and 4. `auto`: from the
            machine and the interval.
        cache: earlier trials.
        progress: called with (trials done, trials in all).

    Raises:
        TraceError: a half of the load has no tokens, or is too short for an interval.
        TopologyError: the numbers contradict each other.
    """
    cache = cache or TrialCache(None)
    rebalancer = rebalancer.model_copy(update={"expert_cost": machine.expert_cost})
    half = trace.num_steps // 2
    if trace.num_steps < LEAST_STEPS:
        raise TraceError(f"{trace.name} has {trace.num_steps} steps; advice needs {LEAST_STEPS} at least")
    first, second = trace.part(0, half), trace.part(half, trace.num_steps)
    for name, part in (("first", first), ("second", second)):
        if not bool(part.load.any()) or not bool(part.single_steps.any()):
            raise TraceError(f"{trace.name}: its {name} half, {part.num_steps} steps, has no tokens")
    slots = [trace.num_experts + extra for extra in redundant or _redundant(trace.num_experts, machine.ranks)]
    steps = list(intervals) or sorted({max(1, half // parts) for parts in _INTERVALS_PER_HALF})
    if max(steps) >= half:
        raise TraceError(
            f"{trace.name} has {trace.num_steps} steps; with an interval of {max(steps)} none are left to "
            f"score of the {half} in a half, on which settings are tried"
        )
    asked: list[tuple[float | Literal["auto"], float]] = [(price, 1.0) for price in prices]
    price, *more_prices = dict.fromkeys(asked or [(planner.move_price, factor) for factor in (1.0, *_PRICES)])

    def setting_of(count: int, interval: int, price: tuple[float | Literal["auto"], float]) -> Setting:
        """The setting with a price and a factor on it."""
        number, factor = price
        if number == "auto":
            number = machine.move_cost(busy_layers(trace), interval).move_price(machine.topology(count))
        return Setting(count, interval, number * factor)

    for count in slots:
        machine.topology(count).check_experts(trace.num_experts)
    done, total = 0, len(slots) * len(steps) + len(more_prices) + 1

    def attempt(load: LoadTrace, setting: Setting, planner: PlannerOptions = planner) -> Trial:
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

    rank_load = mean_rank_load(first, machine.ranks)
    alone = machine.topology(-(-trace.num_experts // machine.ranks) * machine.ranks)
    static = unmoved(first, alone, machine.expert_cost)

    def rate(setting: Setting) -> Rated:
        trial = attempt(first, setting)
        cost = machine.cost(trial, setting, trace.num_experts, busy_layers(trace))
        speedup = static.speedup(trial, machine.expert_cost)
        net = speedup * max(0.0, 1 - cost.transfer_share)
        dispatched = machine.with_dispatch(trial, rank_load)
        return Rated(setting, trial, speedup, cost, net, dispatched and net * dispatched)

    rated = [rate(setting_of(count, interval, price)) for count in slots for interval in steps]
    best = _best(rated)
    rated += [rate(setting_of(best.setting.slots, best.setting.interval, other)) for other in more_prices]
    best = _best(rated)
    again, still = attempt(second, best.setting), unmoved(second, alone, machine.expert_cost)
    test = BackTest(
        predicted=best.trial.balancedness,
        measured=again.balancedness,
        static=still.balancedness,
        similarity=similarity(first.load, second.load),
        speedup=still.speedup(again, machine.expert_cost),
    )
    gain = dispatch_gain(
        best.trial,
        again,
        expert_cost=machine.expert_cost,
        rank_load=rank_load,
        token_seconds=machine.token_seconds,
        message_seconds=machine.message_seconds,
    )
    left_out = machine.message_seconds > 0 and machine.token_seconds is None
    planned = None
    if _plans_for_dispatch(best, planner, trace, half):
        total += 1
        made = attempt(first, best.setting, planner.model_copy(update={"dispatch": "balanced"}))
        # Against the even split of the placements that are made for that one.
        made = made.model_copy(update={"even_cost": best.trial.even_cost})
        dispatched = machine.with_dispatch(made, rank_load)
        planned = dispatched and best.net * dispatched
    return Advice(
        static.balancedness,
        tuple(rated),
        best,
        test,
        cache.hits,
        gain,
        left_out,
        planned,
        rank_load=rank_load,
        engine_steps=trace.engine_steps,
    )


def _plans_for_dispatch(best: Rated, planner: PlannerOptions, trace: LoadTrace, half: int) -> bool:
    """Whether plans for dispatch `balanced` are worth a trial, which takes a tenth of a second a layer."""
    if best.dispatched is None or planner.dispatch == "balanced":
        return False
    gain = best.dispatched / best.net if best.net else 1.0
    plans = trace.num_layers * (half // best.setting.interval)
    return gain > 1 + WORTH_MEMORY and best.setting.slots > trace.num_experts and plans <= _MOST_PLANS


def similarity(one: torch.Tensor, other: torch.Tensor) -> float:
    """Correlation over experts between two loads summed over steps, median over layers.

    Args:
        one, other: [steps, layers, logical], tokens.

    Returns:
        1 for the same proportions, about 0 for unrelated traffic. Layers without load or with equal load of
        all experts are ignored; 1 if all are.
    """
    rows = torch.stack([load.sum(0, dtype=torch.float64) for load in (one, other)])
    rows = rows - rows.mean(2, keepdim=True)
    scale = rows.square().sum(2).sqrt()
    usable = (scale > 1e-9).all(0)
    if not bool(usable.any()):
        return 1.0
    return float(((rows[0] * rows[1]).sum(1) / (scale[0] * scale[1]))[usable].median())


def mean_rank_load(trace: LoadTrace, ranks: int) -> float:
    """Mean load of a rank in one layer and one step, in tokens."""
    steps = trace.single_steps
    return float(steps.sum(dtype=torch.float64)) / max(len(steps) * busy_layers(trace) * ranks, 1)


def busy_layers(trace: LoadTrace) -> int:
    """Number of layers with load: engines record dense layers as rows of zeros."""
    return int((trace.load != 0).any(2).any(0).sum())


def _redundant(experts: int, ranks: int) -> list[int]:
    even = -(-experts // ranks) * ranks - experts
    # Nobody spends memory on more than one redundant expert for two experts.
    return [
        even + extra * ranks for extra in _REDUNDANT_PER_RANK if extra == 0 or 2 * extra * ranks <= experts
    ]


def _best(rated: Sequence[Rated]) -> Rated:
    """The fewest slots within 2% of the best net speed-up, then the fewest moves within 0.5%."""
    top = max(item.net for item in rated)
    slots = min(item.setting.slots for item in rated if item.net >= top * (1 - WORTH_MEMORY))
    rest = [item for item in rated if item.setting.slots == slots]
    top = max(item.net for item in rest)
    good = [item for item in rest if item.net >= top * (1 - _WORTH_MOVES)]
    return min(good, key=lambda item: (item.cost.bytes_per_hour, -item.net))
