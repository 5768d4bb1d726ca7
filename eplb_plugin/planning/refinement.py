"""2-opt on tensors: swap an item of a heavy pack with one of any other pack, for a whole batch at once."""

from __future__ import annotations

import torch

from ..config import PlannerOptions

__all__ = ["objective_value", "refine"]

_LEAST_IMPROVEMENT = 1e-6  # of the mean pack load: smaller gains are not worth a round


def objective_value(weight: torch.Tensor, items: torch.Tensor, objective: str) -> torch.Tensor:
    """What packing minimises, summed over snapshots.

    Args:
        weight: float64 [B, snapshots, n].
        items: int64 [B, packs, capacity], item ids.
        objective: `peak` or `spread`.

    Returns:
        float64 [B].
    """
    load = _pack_loads(weight, items)
    value = load.amax(2)
    if objective == "spread":
        value = value - load.amin(2)
    return value.sum(1)


def refine(weight: torch.Tensor, items: torch.Tensor, options: PlannerOptions) -> torch.Tensor:
    """Improve every packing of the batch by up to `options.refine_rounds` swaps.

    Each round takes the pack that holds the most excess (what the objective would lose if that pack were
    not there) and makes the best of all swaps between it and any other pack. A packing that cannot be
    improved that way tries its other heavy packs, then leaves the batch.

    Args:
        weight: float64 [B, snapshots, n], exact.
        items: int64 [B, packs, capacity], item ids.

    Returns:
        int64 [B, packs, capacity]; the objective of no packing is higher than before.
    """
    items = items.clone()
    placed = _gather_items(weight, items)
    load = placed.sum(3)
    active = torch.arange(items.shape[0], device=items.device)
    tried = torch.zeros(items.shape[0], items.shape[1], dtype=torch.bool, device=items.device)
    threshold = load.mean(2).sum(1) * _LEAST_IMPROVEMENT
    for _ in range(options.refine_rounds):
        heavy, exhausted = _heavy_pack(load[active], tried[active])
        active, heavy = active[~exhausted], heavy[~exhausted]
        if active.numel() == 0:
            break
        gain, mine, other = _best_swap(placed[active], load[active], heavy, options.objective)
        improves = gain > threshold[active]
        tried[active, heavy] = ~improves
        chosen, pack = active[improves], heavy[improves]
        mine, other = mine[improves], other[improves]
        tried[chosen] = False
        capacity = items.shape[2]
        partner, theirs = other // capacity, other % capacity
        items[chosen, pack, mine], items[chosen, partner, theirs] = (
            items[chosen, partner, theirs],
            items[chosen, pack, mine],
        )
        given, taken = placed[chosen, :, pack, mine], placed[chosen, :, partner, theirs]
        placed[chosen, :, pack, mine], placed[chosen, :, partner, theirs] = taken, given
        load[chosen, :, pack] += taken - given
        load[chosen, :, partner] += given - taken
    return items


def _gather_items(weight: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """Weights in their places: float64 [B, snapshots, packs, capacity]."""
    index = items.flatten(1)[:, None, :].expand(-1, weight.shape[1], -1)
    return weight.gather(2, index).view(*weight.shape[:2], *items.shape[1:])


def _pack_loads(weight: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    return _gather_items(weight, items).sum(3)


def _heavy_pack(load: torch.Tensor, tried: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The untried pack with the most excess, int64 [B], and whether none is left, bool [B].

    A pack's excess is the sum, over the snapshots in which it is the heaviest, of its lead over the
    second heaviest. A tie leaves no lead, so the heaviest packs count with a share of their load.
    """
    top = load.topk(2, dim=2).values
    heaviest = load == top[:, :, :1]
    lead = top[:, :, :1] - top[:, :, 1:]
    excess = (heaviest * (lead + 1.0)).sum(1).masked_fill(tried, 0.0)
    heavy = excess.argmax(dim=1)
    return heavy, excess.gather(1, heavy[:, None])[:, 0] <= 0


def _best_swap(
    placed: torch.Tensor, load: torch.Tensor, heavy: torch.Tensor, objective: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best swap of an item of the heavy pack with an item of another pack.

    Args:
        placed: float64 [B, snapshots, packs, capacity]; load: float64 [B, snapshots, packs];
        heavy: int64 [B], the heavy packs.

    Returns:
        gain: float64 [B], by how much the objective falls; place in the heavy pack, int64 [B]; place
        among all items (pack * capacity + place), int64 [B].
    """
    batch, num_snapshots, num_packs, capacity = placed.shape
    row = torch.arange(batch, device=placed.device)
    is_heavy = torch.zeros((batch, num_packs), dtype=torch.bool, device=placed.device)
    is_heavy[row, heavy] = True
    after = torch.zeros((batch, capacity, num_packs, capacity), dtype=placed.dtype, device=placed.device)
    before = torch.zeros(batch, dtype=placed.dtype, device=placed.device)
    for snapshot in range(num_snapshots):
        loads = load[:, snapshot]
        mine = loads[row, heavy]
        shift = placed[row, snapshot, heavy][:, :, None, None] - placed[:, snapshot][:, None]
        lighter = mine[:, None, None, None] - shift
        heavier = loads[:, None, :, None] + shift
        high, rest_high = torch.maximum(lighter, heavier), _largest_other(loads, is_heavy)
        if objective == "spread":
            low = torch.minimum(lighter, heavier)
            rest_low = -_largest_other(-loads, is_heavy)
            after += torch.maximum(high, rest_high[:, None, :, None])
            after -= torch.minimum(low, rest_low[:, None, :, None])
            before += loads.amax(1) - loads.amin(1)
        elif num_snapshots == 1:
            # Judged by the pair alone, so that packs that tie for the peak are lowered one by one.
            after += high
            before += mine
        else:
            after += torch.maximum(high, rest_high[:, None, :, None])
            before += loads.amax(1)
    after.masked_fill_(is_heavy[:, None, :, None], torch.inf)
    flat = after.flatten(1)
    best = flat.argmin(dim=1)
    others = num_packs * capacity
    return before - flat[row, best], best // others, best % others


def _largest_other(loads: torch.Tensor, is_heavy: torch.Tensor) -> torch.Tensor:
    """For each pack, the largest load among the packs that are neither it nor heavy: float64 [B, packs]."""
    rest = loads.masked_fill(is_heavy, -torch.inf)
    if rest.shape[1] < 3:
        return torch.full_like(rest, -torch.inf)
    top = rest.topk(2, dim=1).values
    first = rest.argmax(dim=1, keepdim=True)
    largest = top[:, :1].expand_as(rest).clone()
    return largest.scatter_(1, first, top[:, 1:])
