"""Part replicas of one expert that share a pack, in many packings at once."""

from __future__ import annotations

import torch

from .packing_batch import Packings
from .swaps import gaps, offsets, swap_costs

__all__ = ["part_replicas"]


def part_replicas(packings: Packings, rounds: int, objective: str) -> Packings:
    """Swap items whose expert is in their pack already for items of other packs, at the lowest cost.

    Each round takes one such item of each packing, and swaps it whatever that costs: refinement comes
    afterwards, and a candidate without repeats wins over all others. No swap makes new repeats.

    Args:
        packings: the batch.
        rounds: how many items of each packing at most.
        objective: `peak` or `spread`, what a swap costs.
    """
    pending = packings.repeated()
    for _ in range(rounds):
        place = pending.to(torch.uint8).argmax(dim=1, keepdim=True)
        pack = place // packings.capacity
        weights, experts = packings.weights(), packings.experts()
        load = weights.sum(3)
        offset = offsets(weights, load)
        mine = offset.flatten(2).gather(2, place[:, None].expand(-1, load.shape[1], -1))
        gap = gaps(mine[..., None, None], offset[:, :, None])
        cost = swap_costs(gap, load, pack, objective).squeeze(1)

        # The pack's items may not meet what comes in, nor those of the other pack what goes out.
        in_pack = experts.gather(1, pack[..., None].expand(-1, -1, packings.capacity))
        comes = (experts[:, :, :, None] == in_pack[:, :, None]).any(3)
        goes = (experts == experts.flatten(1).gather(1, place)[..., None]).any(2, keepdim=True)
        cost = cost.masked_fill_(comes | goes, torch.inf).flatten(1)

        best = cost.argmin(dim=1, keepdim=True)
        possible = pending.gather(1, place) & (cost.gather(1, best) < torch.inf)
        packings = packings.swapped(place, torch.where(possible, best, place))
        pending = pending.scatter(1, place, False)
    return packings
