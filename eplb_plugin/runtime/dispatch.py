"""Dispatch tables: which slot a token goes to, given the logical expert that its router chose."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import LoadError, PlacementError
from ..placement import Placement
from ..topology import Topology

__all__ = ["DispatchTables"]

# The fractional part of the golden ratio in 32 bits. Its multiples fill [0, 1) about as evenly as any
# sequence can, over runs of token indices as well as over every second, third or n-th one. An index modulo
# the replica count would be exact on runs, but send all tokens to one replica where topics alternate.
_GOLDEN = 0x9E3779B9
_BITS = 32


class DispatchTables:
    """The slots of every logical expert, on the device, in buffers that never change size or address.

    `update` writes in place, so captured graphs see the new placement at their next replay.

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
        if placement.num_layers != self._shape[0]:
            raise PlacementError(f"{placement} does not fit tables of {self._shape[0]} layers")
        if layers is None:
            layers = range(self._shape[0])
        elif layers:
            placement = Placement(placement.physical_to_logical[list(layers)], placement.num_logical)
        if layers:
            for layer, rows in self.prepare(placement, layers).items():
                self.write(layer, rows)

    def prepare(
        self, placement: Placement, layers: Sequence[int]
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """What `write` needs for each of `layers`, made ahead of time.

        Args:
            placement: of these layers alone.
            layers: which ones they are.

        Raises:
            PlacementError: the placement has other experts or slots than the tables, or other layers.
        """
        if placement.num_logical != self._shape[1] or placement.num_layers != len(layers):
            raise PlacementError(
                f"{placement} does not fit {len(layers)} layers of tables of {self._shape[1]} experts"
            )
        placement.validate(self._topology)
        placement = placement.to("cpu")
        slots, count = placement.logical_to_physical, placement.replica_count
        if self._local_first:
            slots, count = self._prefer_local(slots, count)
        whole = torch.full((*slots.shape[:2], self.max_replicas), -1)
        whole[:, :, : slots.shape[2]] = slots
        return dict(zip(layers, zip(whole.to(self.device), count.to(self.device), strict=True), strict=True))

    def write(self, layer: int, rows: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Make what was prepared for a layer visible to `physical`: two copies on the device."""
        slots, count = rows
        self._slots[layer, 1:].copy_(slots)
        self._count[layer, 1:].copy_(count)

    def reserve(self, num_tokens: int) -> None:
        """Make room for batches of `num_tokens`, before a graph is captured, say."""
        if num_tokens > self._spread.numel():
            size = 1 << (num_tokens - 1).bit_length()
            start = self._rank * (1 << _BITS) // self._topology.num_ranks
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

    def _prefer_local(self, slots: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put an expert's slots on this rank first and count those alone, where it has any."""
        here = self._topology.slots_of_rank(self._rank)
        local = (slots >= here.start) & (slots < here.stop)
        num_local = local.sum(2)
        order = (~local).to(torch.int8).sort(dim=2, stable=True).indices
        slots = slots.gather(2, order)
        beyond = torch.arange(slots.shape[2]) >= num_local.unsqueeze(2)
        slots = slots.masked_fill(beyond & (num_local > 0).unsqueeze(2), -1)
        return slots, torch.where(num_local > 0, num_local, count)
