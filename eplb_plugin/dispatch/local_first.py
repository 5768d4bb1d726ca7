"""Dispatch `local_first`: tokens stay on their rank where it has a replica of their expert."""

from __future__ import annotations

import torch

from ..core.placement import Placement
from ..core.topology import Topology
from .even import EvenDispatch

__all__ = ["LocalFirstDispatch"]


class LocalFirstDispatch(EvenDispatch):
    """`EvenDispatch` over the replicas on this rank; over all replicas for experts without any here.

    Fewer messages, at the price of balance: a rank with many tokens keeps them.
    """

    def __init__(
        self, placement: Placement, topology: Topology, *, rank: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(placement, topology, rank=rank, near=topology.slots_of_rank(rank), device=device)
