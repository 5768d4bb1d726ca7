"""Keep experts that stay on a rank in the slot they had, so that nothing moves within a rank for nothing."""

from __future__ import annotations

import torch

from ..topology import Topology

__all__ = ["keep_slots"]


def keep_slots(physical_to_logical: torch.Tensor, current: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Reorder the slots of each rank so that experts which it holds already stay where they are.

    Args:
        physical_to_logical: int64 [layers, slots], the new placement.
        current: int64 [layers, slots], the placement in force.
        topology: gives slots per rank.

    Returns:
        int64 [layers, slots]: on every rank the same experts as in `physical_to_logical`.
    """
    shape = (-1, topology.slots_per_rank)
    new, old = physical_to_logical.reshape(shape), current.reshape(shape)
    new_key, new_order = _occurrences(new)
    old_key, old_order = _occurrences(old)
    at = torch.searchsorted(old_key, new_key).clamp(max=shape[1] - 1)
    stays = old_key.gather(1, at) == new_key
    kept_slot = old_order.gather(1, at)

    # What stays takes its old slot; the rest fills the free slots in order.
    size = shape[1]
    taken = torch.zeros((new.shape[0], size + 1), dtype=torch.bool, device=new.device)
    taken.scatter_(1, torch.where(stays, kept_slot, size), True)
    free = taken[:, :size].to(torch.int8).sort(dim=1, stable=True).indices
    arriving = (~stays).cumsum(1) - 1
    slot = torch.where(stays, kept_slot, free.gather(1, arriving.clamp(min=0)))
    out = torch.empty_like(new).scatter_(1, slot, new.gather(1, new_order))
    return out.view_as(physical_to_logical)


def _occurrences(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted keys (expert, how many times it came before) of each row, and the slots in that order."""
    size = ids.shape[1]
    by_expert, order = ids.sort(dim=1, stable=True)
    position = torch.arange(size, device=ids.device).expand_as(ids).contiguous()
    first = torch.searchsorted(by_expert, by_expert)
    return by_expert * size + (position - first), order
