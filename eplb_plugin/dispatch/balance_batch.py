"""The split of whole batches: how many of an expert's tokens each of its replicas gets."""

from __future__ import annotations

from typing import SupportsIndex

import numpy as np
import torch

from ..core.errors import LoadError, PlacementError, checked_integer
from ..core.placement import Placement
from ..core.topology import Topology

__all__ = ["balance_batch", "checked_cost"]

_MOST = 2**40  # tokens of an expert, and `expert_cost`: sums over experts and ranks stay far below 2^63
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def balance_batch(
    counts: torch.Tensor, placement: Placement, topology: Topology, *, expert_cost: int = 0
) -> torch.Tensor:
    """Split each batch over the replicas of its experts so that the slowest rank has the least to do.

    Water filling, from the even split on, in nine sweeps over all experts. The tokens of each replicated
    expert in turn come off its ranks, and are filled back in at the lowest level. The cost of a rank is the
    sum over its slots in use of max(`expert_cost`, tokens). The cost of the slowest rank is never above its
    cost with the even split.

    Example: expert 0 with 8 tokens has replicas on two ranks, one of which has 4 tokens of another expert.
    It gets 2 tokens there and 6 on the other rank: both ranks have 6.

    Args:
        counts: integer [layers, logical] or [steps, layers, logical], tokens of each expert, 0 to 2^40.
        placement: of those layers and experts.
        topology: its ranks and slots.
        expert_cost: least cost of a replica in use, in tokens: the time to read the weights of an expert over
            the time of a token.

    Returns:
        int64 [layers, slots] or [steps, layers, slots], tokens of each slot, on the device of `counts`. Over
        the slots of an expert they add up to its count. Equal input gives equal splits on every machine.

    Raises:
        LoadError: `counts` has another shape, another dtype or values out of range; or `expert_cost` has.
        PlacementError: the placement does not fit the topology.
    """
    steps = _checked_counts(counts, placement)
    cost = checked_cost(expert_cost)
    placement.validate(topology)
    # Importing numba takes a while.
    from .split_kernels import split_batches
    from .table_kernels import list_replicas

    ids = np.ascontiguousarray(placement.physical_to_logical.cpu().numpy())
    tokens = np.zeros((len(steps), *ids.shape), np.int64)
    replicas = list_replicas(ids, placement.num_logical, 0, 0)
    ranks = topology.rank_of_slot().numpy()
    split_batches(steps, *replicas, ranks, topology.num_ranks, cost, tokens)
    return torch.from_numpy(tokens).view(*counts.shape[:-1], ids.shape[1]).to(counts.device)


def checked_cost(expert_cost: SupportsIndex) -> int:
    """`expert_cost` as an int. Raises LoadError: no integer, negative, or above 2^40."""
    return checked_integer("expert_cost", expert_cost, LoadError, least=0, most=_MOST)


def _checked_counts(counts: torch.Tensor, placement: Placement) -> np.ndarray:
    """int64 [steps, layers, logical]."""
    if not isinstance(counts, torch.Tensor) or counts.dtype not in _INTEGERS:
        told = counts.dtype if isinstance(counts, torch.Tensor) else type(counts).__name__
        raise LoadError(f"counts is {told}, not a tensor of integers")
    if not isinstance(placement, Placement):
        raise PlacementError(f"placement is a {type(placement).__name__}, not a Placement")
    shape = (placement.num_layers, placement.num_logical)
    if counts.dim() not in (2, 3) or tuple(counts.shape[-2:]) != shape:
        raise LoadError(
            f"counts has shape {tuple(counts.shape)}; the placement has {shape[0]} layers of {shape[1]} "
            "experts"
        )
    steps = np.ascontiguousarray(counts.cpu().numpy().astype(np.int64)).reshape(-1, *shape)
    bad = np.argwhere((steps < 0) | (steps > _MOST))
    if len(bad):
        step, layer, expert = bad[0]
        raise LoadError(
            f"counts of step {step}, layer {layer}, expert {expert} is {steps[step, layer, expert]}, "
            f"outside 0..{_MOST}"
        )
    return steps
