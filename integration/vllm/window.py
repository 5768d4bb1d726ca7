"""vLLM's ring of recorded steps: slot loads become snapshots of expert loads, summed over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

__all__ = ["RingKeeper", "fold_window", "no_samples", "no_window", "sample_window", "sum_over_ranks"]


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

    Idle ranks do not advance in their rings, so ranks stand at different positions. Steps are therefore taken
    by age: the newest step of every rank is in the last snapshot. Device work only; nothing waits for it.

    Args:
        window: integer [ring, layers, slots], tokens of each step; not written to.
        physical_to_logical: integer [layers, slots], the map during recording; -1 is an unused slot.
        position: next position to write, which holds the oldest step.
        steps: number of newest steps to take; older steps belong to earlier intervals.
        snapshots: maximum number of snapshots; there are no more than steps.

    Returns:
        int64 [snapshots, layers, logical], tokens, on the device of `window`.
    """
    ring = window.shape[0]
    steps = min(steps, ring)
    snapshots = min(snapshots, steps)
    # Summed range by range: a copy of the window would be the largest tensor of the rebalance.
    edges = [position - steps - (-snapshot * steps // snapshots) for snapshot in range(snapshots + 1)]
    per_slot = torch.stack([_sum_steps(window, *edge) for edge in pairwise(edges)])
    return _per_expert(per_slot, physical_to_logical, num_logical)


def sample_window(
    window: torch.Tensor,
    physical_to_logical: torch.Tensor,
    num_logical: int,
    *,
    position: int,
    steps: int,
    samples: int,
) -> torch.Tensor:
    """Single steps of this rank per logical expert, evenly spaced, in time order. Device work only.

    Steps are taken by age, as in `fold_window`: on every rank the same ones, unless some were idle meanwhile.

    Args:
        samples: maximum number of steps taken.

    Returns:
        int64 [samples, layers, logical], tokens, on the device of `window`.
    """
    ring = window.shape[0]
    steps = min(steps, ring)
    samples = min(samples, steps)
    ages = [steps - sample * steps // samples for sample in range(samples)]
    per_slot = (
        torch.stack([window[(position - age) % ring].long() for age in ages]) if ages else window[:0].long()
    )
    return _per_expert(per_slot, physical_to_logical, num_logical)


def _per_expert(per_slot: torch.Tensor, physical_to_logical: torch.Tensor, num_logical: int) -> torch.Tensor:
    """int64 [..., layers, logical] from int64 [..., layers, slots]."""
    # Unused slots count for one more expert at the end, which is cut off.
    expert = physical_to_logical.to(torch.int64)
    expert = torch.where(expert < 0, num_logical, expert).expand_as(per_slot)
    per_expert = per_slot.new_zeros(*per_slot.shape[:2], num_logical + 1)
    return per_expert.scatter_add_(2, expert, per_slot)[..., :num_logical]


def _sum_steps(window: torch.Tensor, first: int, end: int) -> torch.Tensor:
    """int64 [layers, slots]: the sum of the steps `first` to `end`, modulo the ring's length."""
    ring = window.shape[0]
    count, first = end - first, first % ring
    total = window[first : first + count].sum(0, dtype=torch.int64)
    if first + count > ring:
        total += window[: first + count - ring].sum(0, dtype=torch.int64)
    return total


def no_window(window: torch.Tensor, num_logical: int, *, steps: int, snapshots: int) -> torch.Tensor:
    """Zeros in the shape of `fold_window`'s result, for a rank where that failed."""
    shape = (min(snapshots, steps, window.shape[0]), window.shape[1], num_logical)
    return torch.zeros(shape, dtype=torch.int64, device=window.device)


def no_samples(window: torch.Tensor, num_logical: int, *, steps: int, samples: int) -> torch.Tensor:
    """Zeros in the shape of `sample_window`'s result, for a rank where that failed."""
    shape = (min(samples, steps, window.shape[0]), window.shape[1], num_logical)
    return torch.zeros(shape, dtype=torch.int64, device=window.device)


def sum_over_ranks(
    loads: Sequence[torch.Tensor], failed: bool, all_reduce: Callable[[torch.Tensor], object]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Sum the loads of all models over the ranks, in one all-reduce. All ranks call it together.

    Args:
        loads: int64 tensors on one device, of the same shapes on every rank.
        failed: whether this rank has zeros in place of its loads.
        all_reduce: sums a tensor over the ranks in place.

    Returns:
        The sums, in the shapes of `loads`; and int64 [1], the number of failed ranks.
    """
    flat = torch.cat([*(load.flatten() for load in loads), loads[0].new_full((1,), int(failed))])
    all_reduce(flat)
    *parts, failures = flat.split([*(load.numel() for load in loads), 1])
    return [part.view(load.shape) for part, load in zip(parts, loads, strict=True)], failures


class RingKeeper:
    """Clears the rings of an `EplbState` when a rearrangement is over.

    vLLM never clears a ring. An idle rank writes nothing to its own, so its old steps would count again, for
    the experts that their slots hold by then. And while weights move layer by layer in the asynchronous mode,
    steps are recorded partly under the old map and partly under the new one.

    Args:
        state: an `EplbState`.
    """

    def __init__(self, state: Any) -> None:
        self._state = state
        self._stale = False

    def rearranged(self) -> None:
        """A rearrangement has begun: `clear` clears the steps that are recorded until its end."""
        self._stale = True

    def clear(self) -> None:
        """Clear the rings if a rearrangement has ended since the last call. Device work only."""
        models = list(self._state.model_states.values())
        if not self._stale or any(model.rebalanced for model in models):
            return
        self._stale = False
        for model in models:
            model.expert_load_window.zero_()
