"""Weigh the snapshots of a window by age, and look at old ones less finely than at new ones."""

from __future__ import annotations

import torch

__all__ = ["condense"]

_FINE = 16  # newest snapshots that stay apart
_MIDDLE = 16  # snapshots before those, merged four at a time; all older ones eight at a time


def condense(load: torch.Tensor, decay: float) -> torch.Tensor:
    """Weigh each snapshot by `decay` to the power of its age, then sum neighbouring old ones.

    Merging costs next to nothing in balance, since old snapshots weigh little, and planning time is
    proportional to the number of snapshots.

    Args:
        load: float64 [snapshots, layers, logical] in time order, tokens.
        decay: weight of a snapshot relative to the next one.

    Returns:
        float64 [fewer snapshots, layers, logical] in time order; a single snapshot as it is.
    """
    num_snapshots = load.shape[0]
    age = torch.arange(num_snapshots - 1, -1, -1, device=load.device)
    weighted = load * (decay**age).to(load.dtype)[:, None, None]
    block = torch.where(
        age < _FINE,
        age,
        torch.where(
            age < _FINE + _MIDDLE,
            _FINE + (age - _FINE) // 4,
            _FINE + _MIDDLE // 4 + (age - _FINE - _MIDDLE) // 8,
        ),
    )
    count = int(block[0]) + 1
    if count == num_snapshots:
        return weighted
    starts = [num_snapshots - 1 - int(a) for a in reversed([age[block == b].max() for b in range(count)])]
    return torch.stack([part.sum(0) for part in weighted.tensor_split(starts[1:])])
