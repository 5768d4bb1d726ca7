"""Replica counts: greedy replication by load per replica."""

from __future__ import annotations

import torch

__all__ = ["count_replicas", "replicate"]


def replicate(weight: torch.Tensor, num_slots: int, max_replicas: int | None = None) -> torch.Tensor:
    """Give each expert one slot, and each further slot to the expert with the most load per replica.

    The greedy rule minimises the largest load per replica. It hands out the largest of all quotients
    weight / k, where k is the number of replicas so far: one sort, no loop. Ties go to the lowest id.

    Args:
        weight: float [X, n], load of each expert.
        num_slots: slots per row, at least n.
        max_replicas: most replicas of one expert, the number of ranks for example. It rises to
            ceil(num_slots / n) where the slots could not be filled otherwise.

    Returns:
        int64 [X, num_slots], the expert of each slot: experts 0..n-1 in order, then the extra replicas.
    """
    rows, num_experts = weight.shape
    device = weight.device
    first = torch.arange(num_experts, device=device).expand(rows, -1)
    extra = num_slots - num_experts
    if extra == 0:
        return first.contiguous()
    fewest = -(-num_slots // num_experts)
    most = extra if max_replicas is None else min(extra, max(max_replicas, fewest) - 1)

    # By falling load, the expert at place i gets its k-th extra replica after (i + 1) * k - 1 others or more:
    # each expert before it has as many quotients that are no smaller. Only these pairs (i, k) compete.
    places = min(num_experts, extra)
    total = sum(min(most, extra // (place + 1)) for place in range(places))
    times = (extra // torch.arange(1, places + 1, device=device)).clamp_(max=most)
    place = torch.arange(places, device=device).repeat_interleave(times, output_size=total)
    held = torch.arange(1, total + 1, device=device) - (times.cumsum(0) - times)[place]

    falling = weight.sort(dim=1, descending=True, stable=True).indices
    # By id, and by k within an expert, so that a stable sort of the quotients settles ties.
    expert, pair = falling.index_select(1, place).sort(dim=1, stable=True)
    held = held.expand(rows, -1).gather(1, pair)
    share = weight.gather(1, expert) / held
    given = share.sort(dim=1, descending=True, stable=True).indices[:, :extra]
    return torch.cat([first, expert.gather(1, given)], dim=1)


def count_replicas(slot_expert: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many slots of each row hold each expert: int64 [X, slots] to int64 [X, num_experts]."""
    count = slot_expert.new_zeros(slot_expert.shape[0], num_experts)
    return count.scatter_add_(1, slot_expert, torch.ones_like(slot_expert))
