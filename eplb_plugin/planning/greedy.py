"""The policy `greedy`, a baseline: the algorithm of today's engines, greedy replication and LPT packing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..config.options import PlannerOptions
from ..core.placement import Placement
from ..core.topology import Topology
from .pipeline import place_from_scratch

__all__ = ["Greedy", "lpt_packing"]


@dataclass(frozen=True)
class Greedy:
    """Plans from scratch, from the summed load, as DeepSeek's EPLB does. It has no options."""

    options: PlannerOptions

    def __call__(self, window: torch.Tensor, topology: Topology, current: Placement | None) -> Placement:
        ids = place_from_scratch(window.sum(0), topology, lambda weight, sizes, _: lpt_packing(weight, sizes))
        return Placement(ids, window.shape[2])


def lpt_packing(weight: torch.Tensor, capacities: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Put each item, from the heaviest to the lightest, into the lightest pack with room.

    Graham's longest-processing-time rule (LPT) with a capacity, as in DeepSeek's EPLB. One step for each
    item, all rows at once. Ties go to the earlier item and the lower pack. `weight` is float [X, n],
    `capacities` the items of each pack, n in all. The result is that of a `pipeline.Packer`.
    """
    rows, num_items = weight.shape
    device = weight.device
    if max(capacities) == min(capacities) == 1:
        pack = torch.arange(num_items, device=device).expand(rows, -1).contiguous()
        return pack, torch.zeros_like(pack)
    capacity = torch.tensor(capacities, device=device)
    falling, order = weight.sort(dim=1, descending=True, stable=True)
    load = torch.zeros((rows, len(capacities)), dtype=weight.dtype, device=device)
    used = torch.zeros((rows, len(capacities)), dtype=torch.int64, device=device)
    load.masked_fill_(used == capacity, torch.inf)
    one = used.new_ones(rows, 1)
    packs, places = [], []
    for item in falling[:, :, None].unbind(1):
        pack = load.argmin(dim=1, keepdim=True)
        packs.append(pack)
        places.append(used.gather(1, pack))
        load.scatter_add_(1, pack, item)
        used.scatter_add_(1, pack, one)
        load.masked_fill_(used == capacity, torch.inf)
    result = torch.stack([torch.cat(packs, dim=1), torch.cat(places, dim=1)])
    pack_index, rank_in_pack = torch.empty_like(result).scatter_(2, order.expand(2, -1, -1), result)
    return pack_index, rank_in_pack
