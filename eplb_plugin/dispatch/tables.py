"""Dispatch tables: which slot a token goes to, given the logical expert that its router chose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..core.errors import LoadError, PlacementError
from ..core.placement import Placement
from ..core.topology import Topology

__all__ = ["DispatchTables"]

# The fractional part of the golden ratio in 32 bits. Its multiples fill [0, 1) about as evenly as any
# sequence can, over runs of token indices as well as over every second, third or n-th one. An index modulo
# the replica count would be exact on runs, but send all tokens to one replica where topics alternate.
_GOLDEN = 0x9E3779B9
_BITS = 32


class DispatchTables:
    """The slots of every logical expert, on the device, in buffers that never change size or address.

    `update` writes in place, so captured graphs see the new placement at their next replay. The numbers that
    spread tokens depend on the largest batch so far: a larger one gets new ones, and the old ones are kept as
    they are, since graphs may read them.

    Args:
        placement: the placement in force; no token goes to an empty slot.
        topology: gives the slots of this rank.
        rank: this rank; each rank starts its tokens at another replica.
        local_first: use the replicas on this rank alone for experts that have any here.
        device: where ids arrive.
    """

    def __init__(
        self,
        placement: Placement,
        topology: Topology,
        *,
        rank: int = 0,
        local_first: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        placement.validate(topology)
        self._topology = topology
        self._rank = rank
        self._local_first = local_first
        self._shape = (placement.num_layers, placement.num_logical)
        # No expert can ever have more replicas, since the others need a slot each.
        self.max_replicas = topology.num_slots - placement.num_logical + 1
        layers, logical = self._shape
        # Not inference tensors, whatever the mode of the caller: those refuse writes outside of it.
        with torch.inference_mode(False):
            # Row 0 is for the id -1 (no expert), which goes to "slot" -1.
            self._slots = torch.full((layers, logical + 1, self.max_replicas), -1, device=device)
            self._count = torch.ones((layers, logical + 1), dtype=torch.int64, device=device)
            self._spread = torch.empty(0, dtype=torch.int64, device=device)
            self._outgrown: list[torch.Tensor] = []  # captured graphs hold their addresses
        self.device = self._slots.device
        self.update(placement)

    @property
    def logical_to_physical(self) -> torch.Tensor:
        """int64 [layers, logical, max_replicas]: slots that this rank's tokens may go to, then -1."""
        return self._slots[:, 1:]

    @property
    def replica_count(self) -> torch.Tensor:
        """int64 [layers, logical]: how many of those slots there are."""
        return self._count[:, 1:]

    def update(self, placement: Placement, layers: Sequence[int] | None = None) -> None:
        """Make the rows of `layers` (None: all) of `placement` visible to `physical`.

        Raises:
            PlacementError: the placement has other layers, experts or slots than the tables.
        """
        if (placement.num_layers, placement.num_logical) != self._shape:
            raise PlacementError(f"{placement} does not fit tables of {self._shape} layers and experts")
        layers = range(self._shape[0]) if layers is None else layers
        if layers:
            rows = placement.physical_to_logical.cpu()[list(layers)]
            for layer, tables in self.prepare(rows, layers).items():
                self.write(layer, tables)

    def prepare(
        self, physical_to_logical: torch.Tensor, layers: Sequence[int]
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """What `write` needs for each of `layers`, made ahead of time.

        Args:
            physical_to_logical: int64 [len(layers), slots] on the CPU, -1 for an empty slot.
            layers: which ones they are.

        Raises:
            PlacementError: it has other slots than the topology, other layers, experts that do not exist, or
                no slot for an expert.
        """
        # Importing numba takes a while.
        from .table_kernels import list_replicas

        ids, logical = np.ascontiguousarray(physical_to_logical.numpy()), self._shape[1]
        wanted = (len(layers), self._topology.num_slots)
        if ids.shape != wanted or ids.min() < -1 or ids.max() >= logical:
            raise PlacementError(
                f"a placement of shape {ids.shape} with experts {ids.min()}..{ids.max()} does not fit "
                f"{wanted[0]} layers of tables of {wanted[1]} slots and {logical} experts"
            )
        slots = np.full((len(layers), logical, self.max_replicas), -1)
        count = np.zeros((len(layers), logical), np.int64)
        here = self._topology.slots_of_rank(self._rank) if self._local_first else slice(0, 0)
        list_replicas(ids, here.start, here.stop, slots, count)
        if not count.all():
            row, expert = np.argwhere(count == 0)[0]
            raise PlacementError(f"layer {layers[row]} has no slot for expert {expert} of {logical}")
        tables = (torch.from_numpy(array).to(self.device) for array in (slots, count))
        return dict(zip(layers, zip(*tables, strict=True), strict=True))

    def write(self, layer: int, rows: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Make what was prepared for a layer visible to `physical`: two copies on the device."""
        slots, count = rows
        self._slots[layer, 1:].copy_(slots)
        self._count[layer, 1:].copy_(count)

    def reserve(self, num_tokens: int) -> None:
        """Make room for batches of `num_tokens`. Call it, or serve such a batch, before a graph is captured:
        what is computed in a capture is not there until the first replay.

        Sizes are powers of two, so all that was outgrown takes no more memory than what is in use.
        """
        if num_tokens > self._spread.numel():
            size = 1 << (num_tokens - 1).bit_length()
            start = self._rank * (1 << _BITS) // self._topology.num_ranks
            self._outgrown.append(self._spread)
            with torch.inference_mode(False):
                token = torch.arange(size, dtype=torch.int64, device=self.device)
                self._spread = (token * _GOLDEN + start) & ((1 << _BITS) - 1)

    def physical(self, layer: int, expert_ids: torch.Tensor) -> torch.Tensor:
        """Choose a replica for every token: by its index in the batch alone, evenly over the replicas.

        Args:
            layer: index of the MoE layer.
            expert_ids: integer [tokens, top_k] or [tokens], logical experts; -1 stays -1.

        Returns:
            Slots, numbered over all ranks; shape and dtype of `expert_ids`.

        Raises:
            LoadError: wrong shape or layer. Ids beyond the experts raise torch's index error, on CUDA
                asynchronously.
        """
        if expert_ids.dim() not in (1, 2) or not 0 <= layer < self._shape[0]:
            raise LoadError(
                f"expert_ids has shape {tuple(expert_ids.shape)} for layer {layer} of {self._shape[0]}, "
                "not [tokens, top_k] or [tokens]"
            )
        tokens = expert_ids.shape[0]
        self.reserve(tokens)
        row = expert_ids.reshape(-1).to(torch.int64) + 1
        count = self._count[layer].index_select(0, row).view(tokens, -1 if tokens else 0)
        replica = ((self._spread[:tokens, None] * count) >> _BITS).view(-1)
        slots = self._slots[layer].view(-1).index_select(0, row * self.max_replicas + replica)
        return slots.view(expert_ids.shape).to(expert_ids.dtype)
