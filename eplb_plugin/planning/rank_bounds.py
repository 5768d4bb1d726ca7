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
    num_experts = load.shape[1]
    height = max(1, _AT_ONCE // (min(num_experts, _HOTTEST) * len(rank_slots) + num_experts))
    parts = [_bound(rows, sorted(rank_slots), _DEPTH) for rows in torch.split(falling, height)]
    return torch.cat(parts) if parts else load.new_zeros(0)


def _bound(falling: torch.Tensor, rank_slots: Sequence[int], depth: int) -> torch.Tensor:
    """`shared_bound` of loads that fall along each row, and of ranks in rising order of their slots."""
    num_experts, num_ranks = falling.shape[1], len(rank_slots)
    spare = sum(rank_slots) - num_experts
    bound = falling.sum(1) / num_ranks
    if num_experts == 0:
        return bound
    # How low m ranks, m = 1, 2, ..., let the peak be that an expert is on: [X, experts, m].
    most = min(num_ranks, spare + 1)
    hot = falling[:, :_HOTTEST]
    number = torch.arange(1, most + 1, dtype=torch.float64, device=falling.device)
    heaviest = torch.nn.functional.pad(falling.cumsum(1), (1, 0))
    total = heaviest[:, -1]
    lowest = hot[:, :, None] / number
    left = sum(rank_slots)
    for m, used in enumerate(accumulate(rank_slots[:most]), 1):
        # The others' slots, on the ranks that have most of them.
        elsewhere = min(left - used, num_experts - 1)
        on_others = heaviest[:, elsewhere : elsewhere + 1].expand_as(hot).clone()
        among = hot[:, :elsewhere]
        on_others[:, : among.shape[1]] = heaviest[:, elsewhere + 1 : elsewhere + 2] - among
        together = (total[:, None] - on_others) / m
        lowest[:, :, m - 1] = torch.maximum(lowest[:, :, m - 1], together)
    lowest = lowest.cummin(2).values
    bound = torch.maximum(bound, lowest[:, :, -1].amax(1))
    if spare < hot.shape[1] * most:
        # Whoever is above the bound needs another slot.
        bound = torch.maximum(bound, lowest.flatten(1).topk(spare + 1, dim=1).values[:, -1])
    if depth == 0 or most < num_ranks or num_ranks == 1:
        return bound
    everywhere = falling[:, 0] / num_ranks
    if num_experts > 1:
        everywhere = everywhere + _bound(falling[:, 1:], [slots - 1 for slots in rank_slots], depth - 1)
    otherwise = lowest[:, 0, num_ranks - 2]
    if spare >= num_ranks:
        otherwise = torch.minimum(otherwise, 2 * falling[:, 0] / (spare + 1))
    return torch.maximum(bound, torch.minimum(everywhere, otherwise))
