"""How many replicas every expert gets."""

from __future__ import annotations

import torch

__all__ = ["replica_slots", "replicate"]


def replicate(
    weight: torch.Tensor,
    num_slots: int,
    max_replicas: int | None = None,
    row_limit: torch.Tensor | None = None,
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
        row_limit: int64 [X], a lower `max_replicas` for each row; raised alike.

    Returns:
        slot_expert: int64 [X, num_slots]: experts 0..n-1 in order, then the extra replicas as given.
    """
    rows, num_experts = weight.shape
    device = weight.device
    first = torch.arange(num_experts, device=device).expand(rows, -1)
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
    if row_limit is not None:
        # Below zero, so that zero loads still come before it.
        share = torch.where(held >= row_limit.clamp(min=fewest)[:, None], -1.0, share)
    given = share.sort(dim=1, descending=True, stable=True).indices[:, :extra]
    return torch.cat([first, expert.gather(1, given)], dim=1)


def replica_slots(slot_expert: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Replica counts [X, n] of `slot_expert` [X, slots], both int64."""
    count = slot_expert.new_zeros(slot_expert.shape[0], num_experts)
    return count.scatter_add_(1, slot_expert, torch.ones_like(slot_expert))
