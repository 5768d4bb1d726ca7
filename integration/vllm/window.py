"""From vLLM's sliding windows of slot loads to snapshots of expert loads, summed over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

__all__ = ["fold_window", "no_window", "sum_over_ranks"]


def fold_window(
    window: torch.Tensor,
    physical_to_logical: torch.Tensor,
    num_logical: int,
    *,
    position: int,
    steps: int,
    snapshots: int,
) -> torch.Tensor:
    """This rank's loads per logical expert, folded into snapshots in time order.

    Ranks write their rings at positions of their own, since idle ranks do not advance; so steps are taken
    by age: the newest of every rank meet in the last snapshot. Device work only, nothing waits for it.

    Args:
        window: integer [ring, layers, slots], tokens of each step; not written to.
        physical_to_logical: integer [layers, slots], the map that the loads were recorded under; -1 is an
            unused slot.
        num_logical: logical experts per layer.
        position: where the ring is written next: its oldest step.
        steps: newest steps to take; older ones belong to an interval that was seen before.
        snapshots: snapshots to fold into, at most; fewer where there are fewer steps.

    Returns:
        int64 [snapshots, layers, logical], tokens, on the device of `window`.
    """
    ring = window.shape[0]
    steps = min(steps, ring)
    snapshots = min(snapshots, steps)
    # Summed range by range: a copy of the window would be the largest tensor of the whole rebalance.
    edges = [position - steps - (-snapshot * steps // snapshots) for snapshot in range(snapshots + 1)]
    per_slot = torch.stack([_sum_steps(window, *edge) for edge in pairwise(edges)])
    # Unused slots are counted for an expert beyond the last one, which is cut off.
    expert = physical_to_logical.to(torch.int64)
    expert = torch.where(expert < 0, num_logical, expert).expand_as(per_slot)
    per_expert = per_slot.new_zeros(*per_slot.shape[:2], num_logical + 1)
    return per_expert.scatter_add_(2, expert, per_slot)[..., :num_logical]


def _sum_steps(window: torch.Tensor, first: int, end: int) -> torch.Tensor:
    """int64 [layers, slots]: the sum of the steps `first` to `end`, which count round the ring."""
    ring = window.shape[0]
    count, first = end - first, first % ring
    total = window[first : first + count].sum(0, dtype=torch.int64)
    if first + count > ring:
        total += window[: first + count - ring].sum(0, dtype=torch.int64)
    return total


def no_window(window: torch.Tensor, num_logical: int, *, steps: int, snapshots: int) -> torch.Tensor:
    """Zeros in place of what `fold_window` returns, for a rank on which it failed."""
    shape = (min(snapshots, steps, window.shape[0]), window.shape[1], num_logical)
    return torch.zeros(shape, dtype=torch.int64, device=window.device)


def sum_over_ranks(
    loads: Sequence[torch.Tensor], failed: bool, all_reduce: Callable[[torch.Tensor], object]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Sum the loads of all models over the ranks, in one all-reduce. All ranks call it together.

    Args:
        loads: int64 tensors on one device, of the same shapes on every rank.
        failed: whether this rank has no loads, but zeros.
        all_reduce: sums a tensor over the ranks in place.

    Returns:
        The sums, in the shapes of `loads`; and int64 [1], how many ranks failed.
    """
    flat = torch.cat([*(load.flatten() for load in loads), loads[0].new_full((1,), int(failed))])
    all_reduce(flat)
    *parts, failures = flat.split([*(load.numel() for load in loads), 1])
    return [part.view(load.shape) for part, load in zip(parts, loads, strict=True)], failures
