"""One layer under balanced dispatch: how every sample is split over the replicas, in fractions of tokens.

The objective is the smooth peak: the 16-norm of the rank loads after the split, averaged over the samples. A
sample has a mean rank load of 1. Splits are kept from exchange to exchange: after a change, two sweeps of
water filling settle them again.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .compiling import jitted
from .snapshot_objective import power_16

__all__ = ["SplitState", "fill", "list_slots", "new_state", "root_16", "settle", "split_evenly", "take_off"]

_RELAX = 0.5
_SETTLED = 1e-3  # a sweep that changes no replica by more of a mean rank load is the last


class SplitState(NamedTuple):
    """Samples, placement, and the split of every sample."""

    samples: np.ndarray  # float64 [samples, logical], tokens / mean rank load
    expert: np.ndarray  # int64 [slots], expert of each slot
    rank_of: np.ndarray  # int64 [slots]
    node_of: np.ndarray  # int64 [ranks]
    slots: np.ndarray  # int64 [slots], expert by expert, rising
    first: np.ndarray  # int64 [logical + 1], where the slots of each expert begin in `slots`
    held: np.ndarray  # int64 [ranks, logical], replicas of an expert on a rank
    fee: np.ndarray  # int64 [ranks, logical], 1 where bringing the expert to the rank is a move
    given: np.ndarray  # float64 [samples, slots], the tokens of each slot
    load: np.ndarray  # float64 [samples, ranks]
    norm: np.ndarray  # float64 [samples], 16-norm of the rank loads
    # float64 and int64 [ranks], scratch of `fill`
    base: np.ndarray
    order: np.ndarray


@jitted
def new_state(samples, expert, rank_of, num_ranks, ranks_per_node, current):
    """The state of a placement, with nothing split yet.

    Args:
        samples: float64 [samples, logical].
        expert, rank_of: int64 [slots]. `expert` is changed by exchanges.
        current: int64 [slots], the placement that moves are counted from, -1 for an empty slot.
    """
    num_samples, num_logical = samples.shape
    num_slots = expert.shape[0]
    node_of = np.empty(num_ranks, np.int64)
    for rank in range(num_ranks):
        node_of[rank] = rank // ranks_per_node
    fee = np.ones((num_ranks, num_logical), np.int64)
    held = np.zeros((num_ranks, num_logical), np.int64)
    for slot in range(num_slots):
        held[rank_of[slot], expert[slot]] += 1
        if current[slot] >= 0:
            fee[rank_of[slot], current[slot]] = 0
    state = SplitState(
        samples=samples, expert=expert, rank_of=rank_of, node_of=node_of,
        slots=np.empty(num_slots, np.int64), first=np.empty(num_logical + 1, np.int64),
        held=held, fee=fee,
        given=np.zeros((num_samples, num_slots)), load=np.zeros((num_samples, num_ranks)),
        norm=np.zeros(num_samples), base=np.empty(num_ranks), order=np.empty(num_ranks, np.int64),
    )  # fmt: skip
    list_slots(expert, state.slots, state.first)
    return state


@jitted
def list_slots(expert, slots, first):
    """Write the slots of each expert, expert by expert and rising, and where they begin."""
    first[:] = 0
    for slot in range(expert.shape[0]):
        first[expert[slot] + 1] += 1
    for x in range(first.shape[0] - 1):
        first[x + 1] += first[x]
    for slot in range(expert.shape[0] - 1, -1, -1):
        # Filled from the end: `first` of the next expert is where this one ends, and moves down.
        first[expert[slot] + 1] -= 1
        slots[first[expert[slot] + 1]] = slot
    # Now `first[x + 1]` is where expert x begins.
    for x in range(first.shape[0] - 1):
        first[x] = first[x + 1]
    first[first.shape[0] - 1] = expert.shape[0]


@jitted
def root_16(x):
    return np.sqrt(np.sqrt(np.sqrt(np.sqrt(x))))


@jitted
def take_off(slots, rank_of, given, load):
    """Take the tokens of an expert off its ranks."""
    for slot in slots:
        load[rank_of[slot]] -= given[slot]


@jitted
def fill(tokens, slots, rank_of, given, load, base, order, relax):
    """Fill the tokens of an expert into its ranks so that the lightest of them end level.

    The tokens are off the ranks. A second replica on a rank gets none. `relax`: of each change, what is added
    on top of it, see `dispatch.split_kernels`. Returns the largest change of a slot.
    """
    usable, last = 0, -1
    change = 0.0
    for slot in slots:
        rank = rank_of[slot]
        if rank == last:
            change = max(change, given[slot])
            given[slot] = 0.0
            continue
        at, last = usable, rank
        here = load[rank] + relax * (load[rank] + given[slot])
        while at > 0 and base[at - 1] > here:
            base[at], order[at] = base[at - 1], order[at - 1]
            at -= 1
        base[at], order[at] = here, slot
        usable += 1
    used, total = 1, tokens + base[0]
    while used < usable and base[used] * used < total:
        total += base[used]
        used += 1
    level = total / used
    for at in range(usable):
        slot = order[at]
        share = level - base[at] if at < used else 0.0
        change = max(change, abs(share - given[slot]))
        given[slot] = share
        load[rank_of[slot]] += share
    return change


@jitted
def split_evenly(state):
    """Spread each expert's tokens evenly over its slots, in every sample."""
    samples, first, slots = state.samples, state.first, state.slots
    state.load[:] = 0.0
    for sample in range(samples.shape[0]):
        for expert in range(samples.shape[1]):
            share = samples[sample, expert] / (first[expert + 1] - first[expert])
            for slot in slots[first[expert] : first[expert + 1]]:
                state.given[sample, slot] = share
                state.load[sample, state.rank_of[slot]] += share


@jitted
def settle(state, tokens, given, load, relaxed, sweeps):
    """Water filling of one sample, from the split that it has, over all replicated experts. Returns the norm.

    Args:
        tokens: float64 [logical]. given: float64 [slots], changed. load: float64 [ranks], changed.
        relaxed, sweeps: sweeps with over-relaxation, and those after them without, at most.
    """
    first, slots, rank_of = state.first, state.slots, state.rank_of
    for sweep in range(relaxed + sweeps):
        relax = _RELAX if sweep < relaxed else 0.0
        change = 0.0
        for expert in range(tokens.shape[0]):
            if first[expert + 1] - first[expert] > 1 and tokens[expert] > 0.0:
                mine = slots[first[expert] : first[expert + 1]]
                take_off(mine, rank_of, given, load)
                moved = fill(tokens[expert], mine, rank_of, given, load, state.base, state.order, relax)
                change = max(change, moved)
        if change < _SETTLED:
            break
    total = 0.0
    for rank in range(load.shape[0]):
        total += power_16(load[rank])
    return root_16(total)
