"""The plain packing that engines use today: longest processing time first, with a capacity."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..core.errors import TopologyError

__all__ = ["items_per_pack", "lpt_packing"]


def items_per_pack(num_items: int, num_packs: int) -> int:
    """`num_items / num_packs`, or TopologyError when that is not a whole number of at least 1."""
    if isinstance(num_packs, bool) or not isinstance(num_packs, int) or num_packs < 1:
        raise TopologyError(f"num_packs={num_packs!r} is not an integer from 1 on")
    if num_items % num_packs:
        raise TopologyError(f"{num_items} items are not divisible by num_packs={num_packs}")
    return num_items // num_packs


def lpt_packing(
    weight: torch.Tensor, num_packs: int, capacities: Sequence[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each item, from the heaviest to the lightest, goes to the lightest pack that has room.

    Graham's longest-processing-time rule with a capacity, as in DeepSeek's EPLB; one step per item, all
    rows at once. Ties go to the earlier item and the lower pack.

    Args:
        weight: float [X, n].
        num_packs: packs per row; divides n where no capacities are given.
        capacities: items of each pack, n in all; None is n / num_packs of each.

    Returns:
        pack_index and rank_in_pack, both int64 [X, n].
    """
    rows, num_items = weight.shape
    if capacities is None:
        capacities = (items_per_pack(num_items, num_packs),) * num_packs
    fewest = min(capacities)
    if max(capacities) == fewest == 1:
        pack = torch.arange(num_items, device=weight.device).expand(rows, -1).contiguous()
        return pack, torch.zeros_like(pack)
    # One number where they are equal, since to put several on a GPU takes a copy that waits.
    even = max(capacities) == fewest
    capacity = fewest if even else torch.tensor(capacities, device=weight.device)
    falling, order = weight.sort(dim=1, descending=True, stable=True)
    load = torch.zeros((rows, num_packs), dtype=weight.dtype, device=weight.device)
    used = torch.zeros((rows, num_packs), dtype=torch.int64, device=weight.device)
    one = used.new_ones(rows, 1)
    packs, ranks = [], []
    for step, item in enumerate(falling[..., None].unbind(1)):
        pack = load.argmin(dim=1, keepdim=True)
        packs.append(pack)
        ranks.append(used.gather(1, pack))
        load.scatter_add_(1, pack, item)
        used.scatter_add_(1, pack, one)
        if step + 1 >= fewest:  # before, no pack can be full
            load.masked_fill_(used == capacity, torch.inf)
    result = torch.stack([torch.cat(packs, dim=1), torch.cat(ranks, dim=1)])
    pack_index, rank_in_pack = torch.empty_like(result).scatter_(2, order.expand(2, -1, -1), result)
    return pack_index, rank_in_pack
