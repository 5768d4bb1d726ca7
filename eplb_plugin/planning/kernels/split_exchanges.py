"""Exchanges of one layer under balanced dispatch: which of them promise to lower the smooth peak.

A rank's price in a sample is the derivative of the smooth peak by its load. Where the split is settled, the
replicas in use of an expert have equal prices, the lowest of its ranks'. So the tokens of an expert cost the
lowest price among its replicas, and to first order an exchange gains what it lowers that. This is the dual
of the linear program of the split: at the peak alone, it would be a bound.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .compiling import jitted
from .snapshot_objective import power_16
from .split_state import fill, root_16, take_off

__all__ = [
    "Candidates",
    "Prices",
    "choose_candidates",
    "local_gain",
    "make_exchange",
    "new_prices",
    "price_ranks",
]

_NEVER = 1e30


class Prices(NamedTuple):
    """First-order gains around the heavy ranks, summed over samples."""

    heavy: np.ndarray  # int64 [heavy ranks], by falling share of the smooth peak
    mine: np.ndarray  # int64 [slots of the heavy ranks, at most], the slots of these
    gain_out: np.ndarray  # float64 [slots of the heavy ranks, ranks], moving such a slot's replica to a rank
    gain_copy: np.ndarray  # the same for one more replica of its expert there
    gain_in: np.ndarray  # float64 [slots, heavy ranks], moving a slot's replica to a heavy rank
    loss: np.ndarray  # float64 [slots], minus the gain of taking the replica away
    # float64 [ranks], scratch
    price: np.ndarray
    share: np.ndarray


class Candidates(NamedTuple):
    """Exchanges by falling first-order gain less the price of their moves.

    In a swap the experts of slots `mine` and `other` change places. In a copy, `other` gets another replica
    of the expert in `mine`, and loses its own, of which there are more.
    """

    gain: np.ndarray  # float64 [candidates]
    mine: np.ndarray  # int64 [candidates]
    other: np.ndarray  # int64 [candidates]
    is_copy: np.ndarray  # bool [candidates]
    moves: np.ndarray  # int64 [candidates]


@jitted
def new_prices(num_slots, num_ranks, num_heavy, most_slots):
    width = num_heavy * most_slots
    return Prices(
        heavy=np.zeros(num_heavy, np.int64), mine=np.zeros(width, np.int64),
        gain_out=np.zeros((width, num_ranks)), gain_copy=np.zeros((width, num_ranks)),
        gain_in=np.zeros((num_slots, num_heavy)), loss=np.zeros(num_slots),
        price=np.zeros(num_ranks), share=np.zeros(num_ranks),
    )  # fmt: skip


@jitted
def _prices_of_sample(load, norm, price):
    """Write the derivative of the norm by each rank's load."""
    for rank in range(load.shape[0]):
        x = load[rank] / norm if norm > 0.0 else 0.0
        x15 = x * x
        x15 = x15 * x  # x^3
        x15 = x15 * x15 * x15 * x15 * x15
        price[rank] = x15


@jitted
def price_ranks(state, prices, stride):
    """Fill `prices` from every `stride`-th sample. Returns the number of slots in `prices.mine`."""
    samples, first, slots, rank_of = state.samples, state.first, state.slots, state.rank_of
    price, share, heavy, mine = prices.price, prices.share, prices.heavy, prices.mine
    num_ranks = price.shape[0]
    share[:] = 0.0
    for sample in range(0, samples.shape[0], stride):
        _prices_of_sample(state.load[sample], state.norm[sample], price)
        for rank in range(num_ranks):
            share[rank] += price[rank] * state.load[sample, rank]
    for place in range(heavy.shape[0]):
        best = 0
        for rank in range(num_ranks):
            if share[rank] > share[best]:
                best = rank
        heavy[place] = best
        share[best] = -1.0
    number = 0
    for place in range(heavy.shape[0]):
        for slot in range(rank_of.shape[0]):
            if rank_of[slot] == heavy[place]:
                mine[number] = slot
                number += 1
    prices.gain_out[:] = 0.0
    prices.gain_copy[:] = 0.0
    prices.gain_in[:] = 0.0
    prices.loss[:] = 0.0
    lowest = np.empty(samples.shape[1])
    second = np.empty(samples.shape[1])
    for sample in range(0, samples.shape[0], stride):
        _prices_of_sample(state.load[sample], state.norm[sample], price)
        tokens = samples[sample]
        for expert in range(tokens.shape[0]):
            low, next_ = _NEVER, _NEVER
            for slot in slots[first[expert] : first[expert + 1]]:
                here = price[rank_of[slot]]
                if here < low:
                    low, next_ = here, low
                elif here < next_:
                    next_ = here
            lowest[expert], second[expert] = low, next_
        for slot in range(rank_of.shape[0]):
            expert = state.expert[slot]
            low, count = lowest[expert], tokens[expert]
            # The lowest price without this replica; infinite for the only one.
            rest = second[expert] if price[rank_of[slot]] == low else low
            if rest < _NEVER:
                prices.loss[slot] += count * (rest - low)
            row = prices.gain_in[slot]
            for place in range(heavy.shape[0]):
                row[place] += count * (low - min(rest, price[heavy[place]]))
        for place in range(number):
            slot = mine[place]
            expert = state.expert[slot]
            low, count = lowest[expert], tokens[expert]
            rest = second[expert] if price[rank_of[slot]] == low else low
            out, copy = prices.gain_out[place], prices.gain_copy[place]
            for rank in range(num_ranks):
                out[rank] += count * (low - min(rest, price[rank]))
                copy[rank] += count * max(0.0, low - price[rank])
    return number


@jitted
def choose_candidates(state, prices, number, fee, moves_left, candidates):
    """List the best exchanges of the slots in `prices.mine`. Returns their number.

    Args:
        number: from `price_ranks`.
        fee: price of a move, times the samples that were priced.
        moves_left: most moves of an exchange.
    """
    expert, rank_of, node_of, held = state.expert, state.rank_of, state.node_of, state.held
    first, heavy = state.first, prices.heavy
    found = 0
    for place in range(number):
        a = prices.mine[place]
        x, rank_a = expert[a], rank_of[a]
        at_heavy = 0
        while heavy[at_heavy] != rank_a:
            at_heavy += 1
        # Of an expert with several replicas on heavy ranks, only the first is copied.
        copies = True
        for other in range(place):
            if expert[prices.mine[other]] == x:
                copies = False
        for b in range(expert.shape[0]):
            y, rank_b = expert[b], rank_of[b]
            if rank_a == rank_b or x == y or node_of[rank_a] != node_of[rank_b] or held[rank_b, x] > 0:
                continue
            if held[rank_a, y] == 0:
                moves = state.fee[rank_b, x] + state.fee[rank_a, y]
                moves -= state.fee[rank_a, x] + state.fee[rank_b, y]
                gain = prices.gain_out[place, rank_b] + prices.gain_in[b, at_heavy] - fee * moves
                if gain > 0.0 and moves <= moves_left:
                    found = _insert(candidates, found, gain, a, b, False, moves)
            if copies and first[y + 1] - first[y] > 1:
                moves = state.fee[rank_b, x] - state.fee[rank_b, y]
                gain = prices.gain_copy[place, rank_b] - prices.loss[b] - fee * moves
                if gain > 0.0 and moves <= moves_left:
                    found = _insert(candidates, found, gain, a, b, True, moves)
    return found


@jitted
def _insert(candidates, found, gain, mine, other, is_copy, moves):
    """Keep the candidates in falling order; equal ones in the order in which they came."""
    size = candidates.gain.shape[0]
    if found == size and gain <= candidates.gain[size - 1]:
        return found
    at = min(found, size - 1)
    while at > 0 and candidates.gain[at - 1] < gain:
        _copy_candidate(candidates, at - 1, at)
        at -= 1
    candidates.gain[at], candidates.mine[at], candidates.other[at] = gain, mine, other
    candidates.is_copy[at], candidates.moves[at] = is_copy, moves
    return min(found + 1, size)


@jitted
def _copy_candidate(candidates, source, target):
    candidates.gain[target] = candidates.gain[source]
    candidates.mine[target], candidates.other[target] = candidates.mine[source], candidates.other[source]
    candidates.is_copy[target] = candidates.is_copy[source]
    candidates.moves[target] = candidates.moves[source]


@jitted
def make_exchange(state, mine, other, is_copy):
    """Change the placement. The splits are left as they are."""
    expert, rank_of, held = state.expert, state.rank_of, state.held
    x, y = expert[mine], expert[other]
    held[rank_of[other], y] -= 1
    held[rank_of[other], x] += 1
    expert[other] = x
    if not is_copy:
        held[rank_of[mine], x] -= 1
        held[rank_of[mine], y] += 1
        expert[mine] = y


@jitted
def local_gain(state, mine, other, is_copy, stride, lists, load, given):
    """The mean gain of an exchange if only its two experts are filled anew: less than it will be.

    Args:
        lists: int64 [2, slots], scratch. load: float64 [ranks], scratch. given: float64 [slots], scratch.
    """
    samples, first, slots, rank_of = state.samples, state.first, state.slots, state.rank_of
    x, y = state.expert[mine], state.expert[other]
    of_x, of_y = slots[first[x] : first[x + 1]], slots[first[y] : first[y + 1]]
    num_x = _exchanged(of_x, -1 if is_copy else mine, other, lists[0])
    num_y = _exchanged(of_y, other, -1 if is_copy else mine, lists[1])
    new_x, new_y = lists[0, :num_x], lists[1, :num_y]
    gain, number = 0.0, 0
    for sample in range(0, samples.shape[0], stride):
        for rank in range(load.shape[0]):
            load[rank] = state.load[sample, rank]
        take_off(of_x, rank_of, state.given[sample], load)
        take_off(of_y, rank_of, state.given[sample], load)
        fill(samples[sample, y], new_y, rank_of, given, load, state.base, state.order, 0.0)
        fill(samples[sample, x], new_x, rank_of, given, load, state.base, state.order, 0.0)
        total = 0.0
        for rank in range(load.shape[0]):
            total += power_16(load[rank])
        gain += state.norm[sample] - root_16(total)
        number += 1
    return gain / number


@jitted
def _exchanged(slots, without, added, result):
    """Write `slots` without one and with another, -1 for none, in rising order. Returns their number."""
    number = 0
    for slot in slots:
        if slot == without:
            continue
        if 0 <= added < slot:
            result[number] = added
            number += 1
            added = -1
        result[number] = slot
        number += 1
    if added >= 0:
        result[number] = added
        number += 1
    return number
