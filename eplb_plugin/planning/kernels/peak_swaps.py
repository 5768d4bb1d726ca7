"""The best swap of a heavy rank with another rank of its node, for the peak of a single load."""

from __future__ import annotations

from .compiling import _compile
from .limits import _LEAST_EXACT_GAIN
from .peak_state import _holds

_SLACK = 1e-4  # how much better another partner may be, as a share of the mean rank load


@_compile
def _best_peak_swap(node, capacity, heavy):
    """The swap that leaves `heavy` and its partner the lowest, within `_SLACK`: (slot, other slot), or -1
    where none helps.

    A swap that shifts `d` leaves the higher of the two at half their sum plus the distance of `d` from half
    their difference. So no partner can do better than half the sum, which rises from the lightest rank on:
    the search ends at the first partner that cannot beat the best.
    """
    expert, share, load, count, room = node.expert, node.share, node.load, node.replicas, node.room
    best = load[heavy] - _LEAST_EXACT_GAIN
    best_mine, best_other = -1, -1
    for rank in node.order:
        middle = (load[heavy] + load[rank]) / 2.0
        if middle >= best or (best_mine >= 0 and middle + _SLACK >= best):
            break
        # What leaves has to make room for the lightest that may arrive, and has to fit the partner.
        least = load[heavy] - best + share[rank * capacity + room[rank] - 1]
        most = best - load[rank] + share[rank * capacity]
        fits = False
        for mine in range(heavy * capacity, heavy * capacity + room[heavy]):
            fits |= least < share[mine] < most
        if not fits:
            continue
        gap, mine, other = _closest_pair(
            expert, share, count, capacity, heavy, room[heavy], rank, room[rank],
            (load[heavy] - load[rank]) / 2.0, best - middle,
        )  # fmt: skip
        if mine >= 0:
            best, best_mine, best_other = middle + gap, mine, other
    return best_mine, best_other


@_compile
def _closest_pair(expert, share, count, capacity, heavy, num_mine, rank, num_others, half, limit):
    """The slots of two ranks whose shares differ by `half` most nearly, closer than `limit`: (distance, slot
    of `heavy`, slot of `rank`), or -1 where there are none.

    Both lists fall, so one pass over both finds it.
    """
    best_mine, best_other = -1, -1
    first, end = rank * capacity, rank * capacity + num_others
    split = first  # the first of those that are light enough to shift `half` or more
    for mine in range(heavy * capacity, heavy * capacity + num_mine):
        wanted = share[mine] - half
        while split < end and share[split] > wanted:
            split += 1
        known, lacks = False, True  # whether `rank` lacks the expert is only looked up where it matters
        for step in (-1, 1):
            other = split - 1 if step < 0 else split
            while first <= other < end:
                gap = abs(share[other] - wanted)
                if gap >= limit:
                    break
                if not known:
                    known = True
                    lacks = count[expert[mine]] == 1 or not _holds(expert, capacity, rank, expert[mine])
                if not lacks:
                    break
                if count[expert[other]] == 1 or not _holds(expert, capacity, heavy, expert[other]):
                    limit = gap
                    best_mine, best_other = mine, other
                    break
                other += step
    return limit, best_mine, best_other
