"""What the ranks need for a split batch, in tokens, and how even that is."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..core.balancedness import balancedness_of_peaks
from ..core.placement import Placement
from ..core.topology import Topology
from .balance_batch import balance_batch
from .shares import replica_numbers

__all__ = ["SplitBalancedness", "even_batch", "rank_costs", "split_balancedness"]


class SplitBalancedness(NamedTuple):
    """Balancedness of single steps by their rank costs: mean over max, summed over layers.

    Attributes:
        even: with each expert's tokens spread evenly over its replicas.
        balanced: with the split of `balance_batch`.
    """

    even: float
    balanced: float


def even_batch(counts: torch.Tensor, placement: Placement) -> torch.Tensor:
    """The even split in whole tokens: the first `count % replicas` slots of an expert get one more.

    Args:
        counts: integer [..., layers, logical], tokens.

    Returns:
        int64 [..., layers, slots], tokens; 0 for an empty slot.
    """
    placement = placement.to(counts.device)
    ids = placement.physical_to_logical
    held, number = ids.clamp(min=0), replica_numbers(placement)
    tokens = counts.long().gather(-1, held.expand(*counts.shape[:-1], -1))
    replicas = placement.replica_count.gather(1, held)
    return torch.where(ids < 0, 0, tokens // replicas + (number < tokens % replicas))


def rank_costs(tokens: torch.Tensor, topology: Topology, expert_cost: int = 0) -> torch.Tensor:
    """The cost of every rank: the sum over its slots in use of max(`expert_cost`, tokens).

    Args:
        tokens: int64 [..., slots].

    Returns:
        int64 [..., ranks], tokens.
    """
    return topology.by_rank(torch.where(tokens > 0, tokens.clamp(min=expert_cost), 0), 0).sum(-1)


def split_balancedness(
    counts: torch.Tensor, placement: Placement, topology: Topology, expert_cost: int = 0
) -> SplitBalancedness:
    """Compare the two splits of whole batches.

    Both are over the mean cost of the even split: what `balanced` saves by using fewer replicas counts.

    Args:
        counts: integer [steps, layers, logical], tokens of single steps.

    Raises:
        As `balance_batch`.
    """
    balanced = balance_batch(counts, placement, topology, expert_cost=expert_cost)
    even = rank_costs(even_batch(counts, placement), topology, expert_cost).double()
    peaks = rank_costs(balanced, topology, expert_cost).amax(2).double()
    mean = even.mean(2)
    return SplitBalancedness(balancedness_of_peaks(mean, even.amax(2)), balancedness_of_peaks(mean, peaks))
