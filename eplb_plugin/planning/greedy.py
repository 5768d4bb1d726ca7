"""The plain packing that engines use today: longest processing time first, with a capacity."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import TopologyError

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
    if max(capacities) == min(capacities) == 1:
        pack = torch.arange(num_items, device=weight.device).expand(rows, -1).contiguous()
        return pack, torch.zeros_like(pack)
    order = weight.sort(dim=1, descending=True, stable=True).indices
    sorted_weight = weight.gather(1, order)
    pack_index = torch.empty_like(order)
    rank_in_pack = torch.empty_like(order)
    load = torch.zeros((rows, num_packs), dtype=weight.dtype, device=weight.device)
    capacity = torch.tensor(capacities, device=weight.device)
    used = torch.zeros((rows, num_packs), dtype=torch.int64, device=weight.device)
    row = torch.arange(rows, device=weight.device)
    for position in range(num_items):
        open_load = load.masked_fill(used == capacity, torch.inf)
        pack = open_load.argmin(dim=1)
        pack_index[row, order[:, position]] = pack
        rank_in_pack[row, order[:, position]] = used[row, pack]
        load[row, pack] += sorted_weight[:, position]
        used[row, pack] += 1
    return pack_index, rank_in_pack
