"""2-opt on tensors: fixed numbers of rounds of swaps between packs, for a whole batch at once.

No round asks whether another is worth it: on a GPU that would wait for the device each time.
"""

from __future__ import annotations

import torch

from .packing_batch import Packings, over_snapshots
from .swaps import cost_now, gaps, offsets, swap_costs, unfit

__all__ = ["even_out", "relieve"]

_LEAST_GAIN = 1e-6  # of the mean pack load: smaller gains are not worth a round


def even_out(packings: Packings, rounds: int, objective: str) -> Packings:
    """Pair the heaviest pack with the lightest, the second heaviest with the second lightest and so on, and
    make the swap of each pair that brings its packs closest together; all pairs in one round.

    Over several snapshots a packing keeps a round only if the objective does not rise; of a single one it
    cannot.

    Args:
        packings: the batch.
        rounds: how many.
        objective: `peak` or `spread`.

    Returns:
        The batch; the objective of no packing is higher than before.
    """
    num_packs, capacity = packings.num_packs, packings.capacity
    pairs = num_packs // 2
    num_snapshots = packings.weight.shape[1]
    least_gain = _least_gain(packings)
    for _ in range(rounds):
        weights = packings.weights()
        load = weights.sum(3)
        falling = over_snapshots(load).sort(dim=1, descending=True, stable=True).indices
        pack = torch.cat([falling[:, :pairs], falling.flip(1)[:, :pairs]], dim=1)
        index = pack[:, None].expand(-1, num_snapshots, -1)
        offset = offsets(weights, load).gather(2, index[..., None].expand(-1, -1, -1, capacity))
        heavy, light = offset.unsqueeze(4)[:, :, :pairs], offset.unsqueeze(3)[:, :, pairs:]
        gap = over_snapshots(gaps(heavy, light))
        expert = packings.experts().gather(1, pack[..., None].expand(-1, -1, capacity))
        same = expert[:, :pairs, :, None] == expert[:, pairs:, None]
        gap.masked_fill_(same.any(3, keepdim=True) | same.any(2, keepdim=True), torch.inf)
        gap = gap.flatten(2)

        best = gap.argmin(dim=2)
        paired = load.gather(2, index)
        now = over_snapshots(gaps(paired[:, :, :pairs], paired[:, :, pairs:]))
        gain = now - gap.gather(2, best[..., None])[..., 0]
        first = pack * capacity
        mine = first[:, :pairs] + best // capacity
        theirs = torch.where(gain > least_gain, first[:, pairs:] + best % capacity, mine)
        after = packings.swapped(mine, theirs)
        if num_snapshots > 1:
            worse = after.value(objective) > packings.value(objective)
            after = packings.swapped(mine, torch.where(worse[:, None], mine, theirs))
        packings = after
    return packings


def relieve(packings: Packings, rounds: int, objective: str) -> Packings:
    """Make the best of all swaps between one pack and the others, one swap a round.

    The pack is the one with the most excess: what the objective would lose if it were not there. For
    `spread` every other round takes the lightest in the same way. Over several snapshots, packs that nothing
    helps are passed over until a swap has been made.

    Args:
        packings: the batch.
        rounds: how many.
        objective: `peak` or `spread`.

    Returns:
        The batch; the objective of no packing is higher than before.
    """
    capacity = packings.capacity
    num_snapshots, num_items = packings.weight.shape[1:]
    tried = torch.zeros_like(packings.items[:, : packings.num_packs], dtype=torch.bool)
    least_gain = _least_gain(packings)
    for number in range(rounds):
        weights, experts = packings.weights(), packings.experts()
        load = weights.sum(3)
        lightest = objective == "spread" and number % 2 == 1
        pack = _most_excess(-load if lightest else load, tried)
        offset = offsets(weights, load)
        index = pack[:, None, :, None].expand(-1, num_snapshots, -1, capacity)
        mine = offset.gather(2, index).transpose(2, 3)[..., None]
        cost = swap_costs(gaps(mine, offset[:, :, None]), load, pack, objective)
        mine = experts.gather(1, index[:, 0]).transpose(1, 2)[..., None]
        # The pack itself is unfit, since it holds all that it holds.
        cost.masked_fill_(unfit(mine, experts[:, None]), torch.inf)
        cost = cost.flatten(1)

        best = cost.argmin(dim=1, keepdim=True)
        helps = cost_now(load, objective)[:, None] - cost.gather(1, best) > least_gain
        place = pack * capacity + best // num_items
        packings = packings.swapped(place, torch.where(helps, best % num_items, place))
        if num_snapshots > 1:
            tried = tried.scatter(1, pack, True) & ~helps
    return packings


def _least_gain(packings: Packings) -> torch.Tensor:
    """float64 [B, 1], twice what a swap has to gain."""
    return packings.weight.sum((1, 2))[:, None] * (2 * _LEAST_GAIN / packings.num_packs)


def _most_excess(load: torch.Tensor, tried: torch.Tensor) -> torch.Tensor:
    """The pack with the most excess that was not tried: int64 [B, 1].

    A pack's excess is the sum, over the snapshots in which it is the heaviest, of its lead over the
    second heaviest. A tie leaves no lead, so the heaviest packs count with a share of their load.
    """
    if load.shape[1] == 1:
        return load[:, 0].argmax(dim=1, keepdim=True)
    top = load.topk(2, dim=2).values
    lead = top[:, :, :1] - top[:, :, 1:] + 1.0
    excess = ((load == top[:, :, :1]) * lead).sum(1).masked_fill_(tried, 0.0)
    return excess.argmax(dim=1, keepdim=True)
