"""Fair tables: how many ranks send their tokens to each slot of a layer, and exchanges of single ranks.

Each rank sends all its tokens of an expert to one slot, so a slot gets whole multiples of tokens / ranks. Of
several slots of an expert on a rank, the first one serves for all.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .compiling import copy_into, jitted

__all__ = ["LEAST_GAIN", "FairState", "new_state", "restore", "settle", "share_out"]

LEAST_GAIN = 1e-9  # of the peak: smaller gains are rounding
_SLACK = 1  # a replica serves at most one rank fewer or more than floor or ceil of its fair part
_MOST_SHIFTS = 4000


class FairState(NamedTuple):
    """A layer: the experts of its slots, and how many ranks each slot serves."""

    expert: np.ndarray  # int64 [slots]
    unit: np.ndarray  # float64 [logical], tokens of an expert from one rank
    sources: np.ndarray  # int64 [slots], ranks served
    level: np.ndarray  # float64 [ranks], tokens
    at: np.ndarray  # int64 [logical, ranks], first slot of an expert on a rank, or -1
    weight: np.ndarray  # int64 [slots], slots of the rank that this one serves for; 0 beside such a slot
    replicas: np.ndarray  # int64 [logical]


@jitted
def new_state(expert, load, num_ranks):
    """The state of a placement, shared out. `expert`, int64 [slots], is changed by exchanges."""
    num_slots, num_logical = expert.shape[0], load.shape[0]
    state = FairState(
        expert=expert,
        unit=load / num_ranks,
        sources=np.empty(num_slots, np.int64),
        level=np.empty(num_ranks),
        at=np.empty((num_logical, num_ranks), np.int64),
        weight=np.empty(num_slots, np.int64),
        replicas=np.empty(num_logical, np.int64),
    )
    share_out(state, np.ones(num_logical, np.bool_))
    return state


@jitted
def share_out(state, chosen):
    """Each replica of some experts serves its part of the ranks, and low levels serve the rest.

    `chosen`: bool [logical]. The others keep their sources; their slots must be those of the last time.
    """
    _index(state)
    num_ranks = state.level.shape[0]
    for slot in range(state.expert.shape[0]):
        if chosen[state.expert[slot]]:
            state.sources[slot] = num_ranks * state.weight[slot] // state.replicas[state.expert[slot]]
    _set_levels(state)
    for expert in np.argsort(-state.unit, kind="mergesort"):
        if chosen[expert]:
            _hand_out_rest(state, expert)


@jitted
def restore(state, expert, sources):
    """Go back to copies of `state.expert` and `state.sources`."""
    copy_into(state.expert, expert)
    copy_into(state.sources, sources)
    _index(state)
    _set_levels(state)


@jitted
def _index(state):
    per_rank = state.expert.shape[0] // state.level.shape[0]
    state.at[:] = -1
    state.replicas[:] = 0
    state.weight[:] = 0
    for slot in range(state.expert.shape[0]):
        expert, rank = state.expert[slot], slot // per_rank
        if state.at[expert, rank] < 0:
            state.at[expert, rank] = slot
        state.weight[state.at[expert, rank]] += 1
        state.replicas[expert] += 1


@jitted
def _set_levels(state):
    per_rank = state.expert.shape[0] // state.level.shape[0]
    state.level[:] = 0.0
    for slot in range(state.expert.shape[0]):
        state.level[slot // per_rank] += state.sources[slot] * state.unit[state.expert[slot]]


@jitted
def _hand_out_rest(state, expert):
    """Give the ranks that no replica of the expert serves to those on the lowest levels, one each."""
    num_ranks = state.level.shape[0]
    rest = num_ranks
    for rank in range(num_ranks):
        if state.at[expert, rank] >= 0:
            rest -= state.sources[state.at[expert, rank]]
    taken = np.zeros(num_ranks, np.bool_)
    for _ in range(rest):
        best = -1
        for rank in range(num_ranks):
            free = state.at[expert, rank] >= 0 and not taken[rank]
            if free and (best < 0 or state.level[rank] < state.level[best]):
                best = rank
        taken[best] = True
        state.sources[state.at[expert, best]] += 1
        state.level[best] += state.unit[expert]


@jitted
def settle(state, first_rank, last_rank):
    """Let the highest of ranks `first_rank..last_rank-1` serve fewer ranks, while that lowers it."""
    for _ in range(_MOST_SHIFTS):
        peak = first_rank
        for rank in range(first_rank, last_rank):
            if state.level[rank] > state.level[peak]:
                peak = rank
        if not _shift(state, peak):
            break


@jitted
def _may_lose(state, slot):
    fair = state.level.shape[0] * state.weight[slot] // state.replicas[state.expert[slot]]
    return state.sources[slot] > max(1, fair - _SLACK)


@jitted
def _may_gain(state, slot):
    fair = -(-state.level.shape[0] * state.weight[slot] // state.replicas[state.expert[slot]])
    return state.sources[slot] < fair + _SLACK


@jitted
def _shift(state, peak):
    """Take a source rank off the peak, alone or against one of another expert's; whether that was possible.

    A source rank of expert e goes from the peak to rank b. Where that makes b too high, one of another expert
    goes on from b: back to the peak or to a third rank.
    """
    expert, unit, at, level = state.expert, state.unit, state.at, state.level
    num_ranks = level.shape[0]
    per_rank = expert.shape[0] // num_ranks
    lowest = level[peak] * (1.0 - LEAST_GAIN)
    chosen = (-1, -1, -1, -1)  # slots: from, to, from, to
    for slot in range(peak * per_rank, (peak + 1) * per_rank):
        e = expert[slot]
        if at[e, peak] != slot or state.replicas[e] == 1 or unit[e] <= 0.0 or not _may_lose(state, slot):
            continue
        left = level[peak] - unit[e]
        if left >= lowest:
            continue
        for b in range(num_ranks):
            to = at[e, b]
            if b == peak or to < 0 or not _may_gain(state, to):
                continue
            reached = max(left, level[b] + unit[e])
            if reached < lowest:
                lowest, chosen = reached, (slot, to, -1, -1)
            for second in range(b * per_rank, (b + 1) * per_rank):
                f = expert[second]
                beside = level[b] + unit[e] - unit[f]
                if beside >= lowest or f == e or at[f, b] != second:
                    continue
                if state.replicas[f] == 1 or not _may_lose(state, second):
                    continue
                for c in range(num_ranks):
                    end = at[f, c]
                    if c == b or end < 0 or not _may_gain(state, end):
                        continue
                    there = left if c == peak else level[c]
                    reached = max(left, beside, there + unit[f])
                    if reached < lowest:
                        lowest, chosen = reached, (slot, to, second, end)
    for start, end in ((chosen[0], chosen[1]), (chosen[2], chosen[3])):
        if start >= 0:
            state.sources[start] -= 1
            state.sources[end] += 1
            level[start // per_rank] -= unit[expert[start]]
            level[end // per_rank] += unit[expert[end]]
    return chosen[0] >= 0
