"""The mapping from experts to slots in force in an engine, and the shares that replicas get from it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...core.placement import Placement
from ...core.topology import Topology
from ...dispatch.shares import balanced_shares, indexed_shares

__all__ = ["DispatchInForce", "IndexMapping"]


class DispatchInForce(NamedTuple):
    """Dispatch `balanced` in an engine, for measuring it on sampled steps.

    Attributes:
        expert_cost: least cost of a replica in use, in tokens.
        copies: ranks that count each token; 1 where ranks have tokens of their own.
    """

    expert_cost: int
    copies: int

    def shares(self, samples: torch.Tensor, placement: Placement, topology: Topology) -> torch.Tensor:
        """See `balanced_shares`. `samples`: int64 [samples, layers, logical], tokens as counted."""
        return balanced_shares(samples // self.copies, placement, topology, self.expert_cost)


class IndexMapping(NamedTuple):
    """An engine's own mapping, by the index of a token in its batch.

    Attributes:
        multiplier: see `indexed_shares`.
        entries: counts of each index over all ranks: experts of a token, times the ranks.
    """

    multiplier: int
    entries: int

    def shares(self, samples: torch.Tensor, placement: Placement) -> torch.Tensor:
        """See `indexed_shares`. `samples`: int64 [samples, layers, logical], tokens as counted."""
        return indexed_shares(placement, samples.sum(2).amax(1) // self.entries, self.multiplier)
