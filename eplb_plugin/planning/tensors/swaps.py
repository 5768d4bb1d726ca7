"""What a swap of two items between two packs comes to, for all swaps of a batch at once.

Sums and differences are doubled, so that halves of whole numbers stay whole: two packs that weigh a and b
weigh, after a swap that moves a net d from the first to the second, (a + b + t) / 2 and (a + b - t) / 2 with
t = |a - b - 2 d|.
"""

from __future__ import annotations

import torch

from .packing_batch import over_snapshots

__all__ = ["cost_now", "gaps", "offsets", "swap_costs", "unfit"]


def offsets(weights: torch.Tensor, load: torch.Tensor) -> torch.Tensor:
    """Load of the pack less twice the weight, for `gaps`: float64, the shape of `weights`.

    Args:
        weights: float64 [B, snapshots, packs, capacity].
        load: float64 [B, snapshots, packs].
    """
    return torch.sub(load[..., None], weights, alpha=2)


def gaps(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """How far apart two packs are after a swap: |mine - theirs| of two broadcast `offsets`."""
    return (mine - theirs).abs_()


def unfit(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Swaps that would put an expert into a pack that has it, or change nothing.

    Args:
        mine: int64 [B, capacity, 1, 1], experts of the places of a pack.
        theirs: int64 [B, 1, packs, capacity], of those of other packs.

    Returns:
        bool [B, capacity, packs, capacity].
    """
    same = mine == theirs
    return same.any(3, keepdim=True) | same.any(1, keepdim=True)


def swap_costs(gap: torch.Tensor, load: torch.Tensor, pack: torch.Tensor, objective: str) -> torch.Tensor:
    """Twice the objective after a swap of an item of `pack` with one of another pack.

    The peak of a single snapshot is judged by the two packs alone, so that packs that tie for the peak are
    lowered one by one.

    Args:
        gap: float64 [B, snapshots, m, packs, capacity], of item m with that in a place of another pack.
        load: float64 [B, snapshots, packs].
        pack: int64 [B, 1].
        objective: `peak` or `spread`.

    Returns:
        float64 [B, m, packs, capacity]; nothing of use where the other pack is `pack`.
    """
    num_snapshots = load.shape[1]
    both = load + load.gather(2, pack[:, None].expand(-1, num_snapshots, -1))
    if objective == "peak" and num_snapshots == 1:
        return gap[:, 0] + both[:, 0, None, :, None]
    is_pack = torch.zeros_like(load, dtype=torch.bool)
    is_pack.scatter_(2, pack[:, None].expand(-1, num_snapshots, -1), True)
    above = torch.sub(_largest_other(load, is_pack) * 2, both)
    cost = torch.maximum(gap, above[:, :, None, :, None])
    if objective == "spread":
        below = torch.add(both, _largest_other(-load, is_pack) * 2)
        return cost.add_(torch.maximum(gap, below[:, :, None, :, None])).sum(1)
    return cost.sum(1) + both.sum(1)[:, None, :, None]


def cost_now(load: torch.Tensor, objective: str) -> torch.Tensor:
    """The same before the swap of an item of the heaviest pack (`spread`: or the lightest): float64 [B]."""
    most = load.amax(2)
    return 2 * over_snapshots(most - load.amin(2) if objective == "spread" else most)


def _largest_other(load: torch.Tensor, is_pack: torch.Tensor) -> torch.Tensor:
    """For each pack, the largest load of those that are neither it nor `is_pack`; -inf if there is none."""
    rest = load.masked_fill(is_pack, -torch.inf)
    top = rest.topk(2, dim=2).values
    return torch.where(rest == top[:, :, :1], top[:, :, 1:], top[:, :, :1])
