"""Dispatch `even`: the tokens of an expert spread evenly over its replicas, by their index in the batch."""

from __future__ import annotations

import torch

from ..core.placement import Placement
from ..core.topology import Topology
from .tables import ReplicaTables

__all__ = ["EvenDispatch"]

# The golden ratio's fraction in 32 bits. Its multiples fill [0, 1) evenly over every run and every stride of
# token indices. An index modulo the replica count is exact on runs, but where two topics alternate in a batch
# it sends all tokens of an expert with two replicas to one of them.
_GOLDEN = 0x9E3779B9
_BITS = 32


class EvenDispatch(ReplicaTables):
    """Replica of a token: its index in the batch, times the golden ratio, as a share of the replicas.

    Each rank starts at another replica. The multiples are kept for the largest batch so far. A larger batch
    gets new ones; the old ones stay, since captured graphs may read them. Arguments: see `ReplicaTables`.
    """

    def __init__(
        self,
        placement: Placement,
        topology: Topology,
        *,
        rank: int = 0,
        near: slice = slice(0, 0),
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(placement, topology, near=near, device=device)
        self._start = rank * (1 << _BITS) // topology.num_ranks
        with torch.inference_mode(False):
            self._spread = torch.empty(0, dtype=torch.int64, device=device)
        self._outgrown: list[torch.Tensor] = []

    def reserve(self, num_tokens: int) -> None:
        """Make room for batches of `num_tokens`. Call it, or serve such a batch, before a graph capture:
        memory that is computed within a capture is empty until the first replay.

        Sizes are powers of two: all outgrown buffers together are no larger than the one in use.
        """
        if num_tokens > self._spread.numel():
            size = 1 << (num_tokens - 1).bit_length()
            self._outgrown.append(self._spread)
            with torch.inference_mode(False):
                token = torch.arange(size, dtype=torch.int64, device=self.device)
                self._spread = (token * _GOLDEN + self._start) & ((1 << _BITS) - 1)

    def physical(self, layer: int, expert_ids: torch.Tensor) -> torch.Tensor:
        """The slot of each token, numbered over all ranks; shape and dtype of `expert_ids`. Device work only.

        Args:
            layer: index of the MoE layer.
            expert_ids: int32 or int64 [tokens, top_k] or [tokens], logical experts; -1 stays -1.

        Raises:
            LoadError: wrong shape, dtype or layer. Ids beyond the experts raise torch's index error, on CUDA
                asynchronously.
        """
        self.check_ids(layer, expert_ids)
        tokens = expert_ids.shape[0]
        self.reserve(tokens)
        row = expert_ids.reshape(-1).to(torch.int64) + 1
        replica = self._count[layer].index_select(0, row).view(tokens, -1 if tokens else 0)
        replica = replica.mul_(self._spread[:tokens, None]).bitwise_right_shift_(_BITS).view(-1)
        index = replica.add_(self._first[layer].index_select(0, row))
        slots = self._slots[layer].index_select(0, index)
        return slots.view(expert_ids.shape).to(expert_ids.dtype)

    def physical_and_received(self, layer: int, expert_ids: torch.Tensor) -> tuple[torch.Tensor, None]:
        """As `physical`; what other ranks send is not known."""
        return self.physical(layer, expert_ids), None
