"""What ranks that share their experts among them cannot beat, whatever the replica counts are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

__all__ = ["shared_bound"]

_HOTTEST = 64  # experts whose ranks are counted; the others take a slot each
_DEPTH = 3  # experts that are taken off since they are on every rank
_AT_ONCE = 1 << 22  # numbers


def shared_bound(load: torch.Tensor, rank_slots: Sequence[int]) -> torch.Tensor:
    """A lower bound on the peak of ranks that hold all of `load` and nothing else.

    An expert on m ranks loads each of them with at least what it has by m. The other R - m ranks have so many
    slots, which carry no more than as many of the heaviest of the other experts; all the rest is on those m,
    and one of them has at least the mean. Both fall with m (the running minimum of it), and ranks beyond the
    first cost a slot each: below the bound, experts would need more slots than there are.

    An expert that is on all ranks, evenly, leaves each of them with that much less and a slot fewer. So the
    bound is either that of all but one rank for it, or its share and the bound of the others. More replicas
    than ranks, which are not even, put two on some rank.

    Args:
        load: float64 [X, experts], tokens.
        rank_slots: slots of each rank; no fewer than experts.

    Returns:
        float64 [X], tokens.
    """
    falling = load.sort(dim=1, descending=True).values
    spare = sum(rank_slots) - load.shape[1]
    width = min(_HOTTEST, spare + 1) * min(len(rank_slots), spare + 1) + load.shape[1]
    parts = torch.split(falling, max(1, _AT_ONCE // width))
    return torch.cat([_bound(rows, sorted(rank_slots), _DEPTH) for rows in parts])


def _bound(falling: torch.Tensor, rank_slots: Sequence[int], depth: int) -> torch.Tensor:
    """`shared_bound` of loads that fall along each row, and of ranks in rising order of their slots."""
    num_experts, num_ranks = falling.shape[1], len(rank_slots)
    spare = sum(rank_slots) - num_experts
    most = min(num_ranks, spare + 1)
    heaviest = torch.nn.functional.pad(falling.cumsum(1), (1, 0))
    total = heaviest[:, -1]
    bound = total / num_ranks
    if num_experts == 0:
        return bound
    # How low m ranks, m = 1, 2, ..., let the peak be that an expert is on: [X, experts, m]. No more experts
    # than there are spare slots, and one, can decide.
    hot = falling[:, : min(_HOTTEST, spare + 1)]
    number = torch.arange(1, most + 1, device=falling.device)
    # The other ranks are those with most slots.
    used = torch.tensor(list(accumulate(rank_slots[:most])), device=falling.device)
    elsewhere = (sum(rank_slots) - used).clamp_(max=num_experts - 1)
    among = torch.arange(hot.shape[1], device=falling.device)[:, None] < elsewhere
    others = torch.where(
        among,
        heaviest[:, None].index_select(2, elsewhere + 1) - hot[:, :, None],
        heaviest[:, None].index_select(2, elsewhere),
    )
    lowest = torch.maximum(hot[:, :, None], total[:, None, None] - others) / number
    lowest = lowest.cummin(2).values
    bound = torch.maximum(bound, lowest[:, 0, -1])
    if spare < hot.shape[1] * most:
        # Whoever is above the bound needs another slot.
        bound = torch.maximum(bound, lowest.flatten(1).topk(spare + 1, dim=1).values[:, -1])
    if depth == 0 or most < num_ranks or num_ranks == 1:
        return bound
    otherwise = lowest[:, 0, num_ranks - 2]
    if spare >= num_ranks:
        otherwise = torch.minimum(otherwise, 2 * falling[:, 0] / (spare + 1))
    rows = (otherwise > bound).nonzero()[:, 0]
    if rows.numel():
        everywhere = falling[rows, 0] / num_ranks
        if num_experts > 1:
            left = [slots - 1 for slots in rank_slots]
            everywhere = everywhere + _bound(falling[rows, 1:], left, depth - 1)
        bound[rows] = torch.maximum(bound[rows], torch.minimum(everywhere, otherwise[rows]))
    return bound
