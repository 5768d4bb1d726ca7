"""One rebalance, from recorded loads to the placement in force: the same on all ranks, or nowhere.

The whole protocol is `rebalance`, in seven phases; `relocation.py` has phases 5 and 6. What fails on one rank
before a commit is told to all in a vote, and all keep what they have. A rank that cannot be reached ends the
balancing, see `RankLostError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..config.options import PlannerOptions
from ..core.balancedness import balancedness
from ..core.errors import AgreementError, EplbError, LoadError, RankLostError
from ..core.placement import Placement
from ..dispatch.rank_costs import split_balancedness
from ..planning.move_cost import MoveCost, with_price
from ..planning.planner import plan
from .context import Context
from .control.rank_group import content_hash
from .control.scheduling import Scheduler
from .control.throttle import Throttle
from .load_window import IntervalLoad
from .move_times import move_cost_of, times_to_sum
from .relocation import relocate
from .repair import audit
from .reports import DraftReport, RebalanceReport

__all__ = ["Outcome", "Request", "agree_on_plan", "gather", "plan_layers", "rebalance", "write_report"]

_LAYERS_AT_ONCE = 4  # layers that the background plans between two pauses


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """What the serving thread asks for.

    Attributes:
        number: of the rebalance, the same on every rank.
        step: steps that the rank had ended when the interval did.
        intervals: recorded on this rank since the last rebalance.
        num_steps: forward steps of these intervals.
        step_seconds: duration of a step on this rank; 0: unknown.
    """

    number: int
    step: int
    intervals: Sequence[IntervalLoad]
    num_steps: int = 0
    step_seconds: float = 0.0


class Gathered(NamedTuple):
    """What all ranks know of an interval.

    Attributes:
        interval: tokens over all ranks.
        cost: of a move; None for a loop that moves no weights.
    """

    interval: IntervalLoad
    cost: MoveCost | None


@dataclass(frozen=True, eq=False, kw_only=True)
class Outcome:
    """The result of a rebalance.

    Attributes:
        report: for the user.
        interval_load: int64 [snapshots, layers, logical], tokens of the interval over all ranks.
        placement: in force from now on.
        step: at which all ranks show it.
    """

    report: RebalanceReport
    interval_load: torch.Tensor
    placement: Placement
    step: int


def rebalance(context: Context, request: Request, scheduler: Scheduler) -> Outcome:
    """All ranks, once for each request: gather, plan, agree, verify, stage, commit, report.

    The fence for `Outcome.step` is set on return: the caller releases it.

    Raises:
        RankLostError: a rank does not answer. Each layer has its old placement or its new one, alike on all
            ranks that answer. UndecidedError: this rank cannot know which.
    """
    throttle, draft = scheduler.throttle, DraftReport()
    before = context.in_force.placement
    none = torch.zeros(0, before.num_layers, before.num_logical, dtype=torch.int64)
    interval, cost = Gathered(IntervalLoad(none, none), None)
    throttle.pause()
    try:
        # 1. Gather: the loads of the interval, summed over the ranks, go to the window.
        with draft.timing("gather_seconds"):
            interval, cost = gather(context, request, throttle)
        throttle.pause()

        goal = before.physical_to_logical
        load = context.window.load()
        if context.options.mode == "observe":
            draft.notes.append("mode observe plans nothing")
        elif not bool(load.any()):
            draft.notes.append("no load was recorded")
        else:
            with draft.timing("plan_seconds"):
                # 2. Plan: rank 0 plans all layers, or each rank its share.
                options = with_price(context.planner, cost, context.topology)
                rows = plan_layers(context, request.number, load, scheduler, options)
                # 3. Agree: all ranks get the rows of all, and compare a hash of the plan.
                goal = agree_on_plan(context, rows, throttle)
            if torch.equal(goal, before.physical_to_logical):
                draft.notes.append(f"no layer gains min_gain={context.planner.min_gain}")
            throttle.pause()

        # 4. Verify: the weights in force, against their fingerprints; an eighth of the layers in turn.
        corrupted = audit(context, request.number, throttle)

        # 5. Stage and 6. two-phase commit, for each migration batch: all ranks get all weights that they need
        # and verify them; then all switch at the same step, or none does.
        relocate(context, request.number, goal, scheduler, draft, corrupted)
    except RankLostError:
        raise
    except EplbError as error:
        draft.failed = True
        draft.notes.append(str(error))

    # 7. Record on rank 0, and report: shown at the same step on all ranks.
    if context.recorder is not None:
        sizes = context.weights.expert_bytes
        context.recorder.add(
            interval,
            before,
            context.topology,
            expert_bytes=sum(sizes) / len(sizes),
            step_seconds=request.step_seconds,
            num_steps=request.num_steps,
        )
    report = write_report(context, request, draft, before, Gathered(interval, cost), throttle)
    fence = scheduler.propose_step()
    step = max(context.connections.control.vote(f"ending rebalance {request.number}", value=fence))
    return Outcome(
        report=report, interval_load=interval.snapshots, placement=context.in_force.placement, step=step
    )


def gather(context: Context, request: Request, throttle: Throttle) -> Gathered:
    """All ranks: check what each recorded, and sum it, with what each measured.

    Returns:
        Tokens of the new intervals over all ranks; the snapshots are in the window too. The cost of a move.

    Raises:
        EplbError: on all ranks, if one of them has weights or loads that are not as they should be.
        AgreementError: ranks recorded different numbers of snapshots.
    """
    throttle.ranks_met()
    context.streams.catch_up()
    control, window = context.connections.control, context.window
    shape = window.num_layers, window.num_logical
    loads: list[IntervalLoad] = []
    error = None
    try:
        context.weights.check()
        loads = [IntervalLoad(*(_checked(part, shape) for part in load)) for load in request.intervals]
    except Exception as caught:  # every kind, since the other ranks wait
        error = caught
    snapshots, samples = (sum(len(load[part]) for load in loads) for part in (0, 1))
    phase = f"taking the load in rebalance {request.number}"
    if len(set(control.vote(phase, error, (samples << 32) + snapshots))) > 1:
        raise AgreementError(f"ranks took part in different numbers of steps, here {snapshots} snapshots")
    # All ranks have ended the rebalance before, so all have read its decisions.
    context.connections.two_phase_commit.decisions.forget(delete=control.rank == 0)
    for load in loads:
        window.push(control.sum(load.snapshots), control.sum(load.samples))
    times = control.sum(times_to_sum(request.step_seconds, context.transfer_times))
    none = torch.zeros(0, *shape, dtype=torch.int64)
    interval = IntervalLoad(
        torch.cat([none, *(load.snapshots for load in loads)]),
        torch.cat([none, *(load.samples for load in loads)]),
    )
    return Gathered(interval, move_cost_of(times, context.weights, context.topology, context.options))


def plan_layers(
    context: Context, number: int, load: torch.Tensor, scheduler: Scheduler, options: PlannerOptions
) -> torch.Tensor:
    """All ranks: plan the share of this rank.

    Args:
        load: int64 [snapshots, layers, logical], tokens of the window over all ranks.
        options: of the planner, with the price of a move.

    Returns:
        int64 [share, slots]: the placement of these layers. `planning=leader`: all layers on rank 0, zeros on
        the others. `sharded`: with 61 layers and 8 ranks, 8 on each but 5 on the last, then zeros.

    Raises:
        EplbError: on all ranks, if one of them fails.
    """
    scheduler.throttle.ranks_met()
    control, (num_layers, num_logical) = context.connections.control, load.shape[1:]
    share = num_layers if context.options.planning == "leader" else -(-num_layers // control.size)
    first = min(control.rank * share, num_layers)
    last = min(first + share, num_layers)
    rows = torch.zeros(share, context.topology.num_slots, dtype=torch.int64)
    in_force = context.in_force.physical_to_logical
    samples = context.window.samples() if context.planner.dispatch == "balanced" else None

    def plan_share() -> None:
        # Layers are planned independently, so their number in one call does not change the plan.
        at_once = max(share, 1) if scheduler.round_bytes is None else _LAYERS_AT_ONCE
        for start in range(first, last, at_once):
            end = min(start + at_once, last)
            current = Placement(in_force[start:end], num_logical)
            planned = plan(
                load[:, start:end],
                context.topology,
                current,
                options,
                samples=None if samples is None else samples[:, start:end],
            )
            rows[start - first : end - first] = planned.placement.physical_to_logical
            scheduler.throttle.pause()

    control.attempt(f"planning in rebalance {number}", plan_share)
    return rows


def agree_on_plan(context: Context, rows: torch.Tensor, throttle: Throttle) -> torch.Tensor:
    """All ranks: exchange what each planned, and check that all have the same.

    Args:
        rows: int64 [share, slots], from `plan_layers`.

    Returns:
        int64 [layers, slots], the plan.

    Raises:
        AgreementError: ranks have different plans. PlacementError: it is no placement.
    """
    throttle.ranks_met()
    control, window = context.connections.control, context.window
    if context.options.planning == "leader":
        goal = control.broadcast(rows)
    else:
        goal = control.all_gather(rows).flatten(0, 1)[: window.num_layers]
    control.agree("the plan", content_hash(goal))
    Placement(goal, window.num_logical)  # raises on all ranks alike
    return goal


def write_report(
    context: Context,
    request: Request,
    draft: DraftReport,
    before: Placement,
    gathered: Gathered,
    throttle: Throttle,
) -> RebalanceReport:
    """This rank: the report, with the balancedness of the interval under the old and the new placement.

    Args:
        before: the placement in force at the start.
        gathered: tokens over all ranks, and the cost of a move.
    """
    throttle.ranks_met()
    throttle.pause()
    interval, cost = gathered
    after = context.in_force.placement
    changed = (after.physical_to_logical != before.physical_to_logical).any(1)
    draft.add(layers=int(changed.sum()))
    if interval.snapshots.shape[0]:
        levels = [balancedness(interval.snapshots, x, context.topology) for x in (before, after)]
        draft.add(balancedness_before=levels[0], balancedness_after=levels[1])
        # The splits of `own` are not those of whole batches.
        if context.options.dispatch == "balanced" and context.options.batch != "own":
            samples = interval.samples[interval.samples.any(2).any(1)]
            if len(samples):
                levels = _measure_dispatch(context, (before, after), samples, draft, throttle)
        if cost is not None:
            draft.add(gain_seconds=cost.gain_seconds(*levels))
    report = draft.finish(request.step, cost)
    throttle.pause()
    return report


def _measure_dispatch(
    context: Context,
    placements: tuple[Placement, Placement],
    samples: torch.Tensor,
    draft: DraftReport,
    throttle: Throttle,
) -> list[float]:
    """Add the balancedness of sampled steps with the even split, and with the split of the dispatch.

    Args:
        placements: the old and the new one.
        samples: int64 [samples, layers, logical], steps with tokens.

    Returns:
        With the split of the dispatch, under each of the placements.
    """
    if context.options.batch == "replicated":  # every rank has recorded all tokens
        samples = samples // context.topology.num_ranks
    levels: list[float] = []
    for placement in placements if placements[0] != placements[1] else placements[:1]:
        gains = []
        for sample in samples:
            gains.append(
                split_balancedness(sample.unsqueeze(0), placement, context.topology, context.expert_cost)
            )
            throttle.pause()
        even, balanced = (sum(parts) / len(gains) for parts in zip(*gains, strict=True))
        if not levels:
            draft.add(sampled_balancedness_even=even, sampled_balancedness=balanced)
        levels.append(balanced)
    return [levels[0], levels[-1]]


def _checked(load: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """An interval on the CPU. LoadError: it is malformed."""
    load = load.cpu()
    if load.dtype != torch.int64 or load.shape[1:] != shape:
        raise LoadError(
            f"the recorded load is {load.dtype} {tuple(load.shape)}, not int64 "
            f"[snapshots, {shape[0]}, {shape[1]}]"
        )
    if load.numel() and int(load.min()) < 0:
        raise LoadError(f"the recorded load holds {int(load.min())} tokens")
    return load
