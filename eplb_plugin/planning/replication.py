"""How many replicas every expert gets."""

from __future__ import annotations

import torch

__all__ = ["replica_slots", "replicate"]


def replicate(weight: torch.Tensor, num_slots: int, max_replicas: int | None = None) -> torch.Tensor:
    """Give every expert one replica and each further slot to the expert with the most load per replica.

    Greedy on load per replica is optimal for the largest load per replica. All rows at once; exact ties
    go to the lowest id.

    Args:
        weight: float [X, n], load of each expert.
        num_slots: slots per row, at least n.
        max_replicas: most replicas of one expert (ranks it can be spread over); where n * max_replicas
            is below num_slots the bound rises as little as it must.

    Returns:
        slot_expert: int64 [X, num_slots]: experts 0..n-1 in order, then the extra replicas as given.
    """
    rows, num_experts = weight.shape
    first = torch.arange(num_experts, device=weight.device).expand(rows, -1)
    extra = num_slots - num_experts
    if max_replicas is None:
        max_replicas = extra + 1
    max_replicas = max(max_replicas, -(-num_slots // num_experts))
    if extra == 0:
        return first.contiguous()
    # Below zero for an expert that may have no more, so that zero loads still come before it.
    share = weight.clone()
    count = torch.ones_like(weight)
    given = torch.empty((rows, extra), dtype=torch.int64, device=weight.device)
    row = torch.arange(rows, device=weight.device)
    for step in range(extra):
        expert = share.argmax(dim=1)
        given[:, step] = expert
        more = count[row, expert] + 1
        count[row, expert] = more
        share[row, expert] = torch.where(more >= max_replicas, -1.0, weight[row, expert] / more)
    return torch.cat([first, given], dim=1)


def replica_slots(slot_expert: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Replica counts [X, n] of `slot_expert` [X, slots], both int64."""
    count = slot_expert.new_zeros(slot_expert.shape[0], num_experts)
    return count.scatter_add_(1, slot_expert, torch.ones_like(slot_expert))
