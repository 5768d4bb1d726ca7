"""How many replicas every expert gets."""

from __future__ import annotations

import torch

__all__ = ["replica_slots", "replicate"]


def replicate(
    weight: torch.Tensor, num_slots: int, max_replicas: int | None = None, variants: int = 1
) -> torch.Tensor:
    """Give every expert one replica and each further slot to the expert with the most load per replica.

    Greedy on load per replica is optimal for the largest load per replica. What the greedy rule hands out
    are the largest of all quotients weight / k, k being the replicas that the expert has by then, so it
    takes one sort and no loop. Exact ties go to the lowest id.

    Args:
        weight: float [X, n], load of each expert.
        num_slots: slots per row, at least n.
        max_replicas: most replicas of one expert (ranks it can be spread over); where n * max_replicas
            is below num_slots the bound rises as little as it must.
        variants: the first one is this; in those after it no expert has more than one, two, ... replicas
            fewer than the most that any has in the first, as far as the slots allow.

    Returns:
        slot_expert: int64 [X, variants, num_slots]: experts 0..n-1 in order, then the extra replicas.
    """
    rows, num_experts = weight.shape
    device = weight.device
    first = torch.arange(num_experts, device=device).expand(rows, variants, -1)
    extra = num_slots - num_experts
    if extra == 0:
        return first.contiguous()
    fewest = -(-num_slots // num_experts)
    most = extra if max_replicas is None else min(extra, max(max_replicas, fewest) - 1)

    # The expert at place i of falling loads gets no k-th extra replica before (i + 1) * k - 1 others are
    # given: each expert before it has as many quotients that are no smaller. These pairs (i, k) are left.
    places = min(num_experts, extra)
    total = sum(min(most, extra // (place + 1)) for place in range(places))
    times = (extra // torch.arange(1, places + 1, device=device)).clamp_(max=most)
    place = torch.arange(places, device=device).repeat_interleave(times, output_size=total)
    held = torch.arange(1, total + 1, device=device) - (times.cumsum(0) - times)[place]

    falling = weight.sort(dim=1, descending=True, stable=True).indices
    # By id, and of one expert by k, so that a stable sort of the quotients settles ties.
    expert, pair = falling.index_select(1, place).sort(dim=1, stable=True)
    held = held.expand(rows, -1).gather(1, pair)
    share = weight.gather(1, expert) / held
    given = share.sort(dim=1, descending=True, stable=True).indices[:, None, :extra]
    if variants > 1:
        limit = held.gather(1, given[:, 0]).amax(1, keepdim=True) + 1
        limit = (limit - torch.arange(1, variants, device=device)).clamp_(min=fewest)
        # Below zero, so that zero loads still come before it.
        share = torch.where(held[:, None] >= limit[:, :, None], -1.0, share[:, None])
        others = share.sort(dim=2, descending=True, stable=True).indices[:, :, :extra]
        given = torch.cat([given, others], dim=1)
    return torch.cat([first, expert[:, None].expand(-1, variants, -1).gather(2, given)], dim=2)


def replica_slots(slot_expert: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Replica counts [X, n] of `slot_expert` [X, slots], both int64."""
    count = slot_expert.new_zeros(slot_expert.shape[0], num_experts)
    return count.scatter_add_(1, slot_expert, torch.ones_like(slot_expert))
