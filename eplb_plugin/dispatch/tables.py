"""The replicas of every logical expert, on the device, for whatever dispatch chooses among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..core.errors import LoadError, PlacementError
from ..core.placement import Placement
from ..core.topology import Topology

__all__ = ["LayerTables", "ReplicaTables"]


_ID_DTYPES = (torch.int32, torch.int64)


class LayerTables(NamedTuple):
    """The tables of one layer, ready to be copied into those in force.

    Attributes:
        slots: int64 [slots + 1]: the slots of expert 0, then those of expert 1, and so on; -1 behind them.
        first: int64 [logical], index of the first slot of each expert in that row.
        counts: int64 [logical], its slots.
    """

    slots: torch.Tensor
    first: torch.Tensor
    counts: torch.Tensor


class ReplicaTables:
    """The slots of all experts of a layer in one row, and the span of each expert within it.

    The size does not depend on the replica counts: 58 layers of 256 experts in 288 slots take 0.4 MB. Buffers
    keep size and address: captured graphs see a new placement at their next replay.

    Args:
        placement: the placement in force; empty slots are left out.
        topology: number of slots.
        near: slots preferred by this rank: an expert with replicas among them has no others here.
        device: where expert ids arrive.
    """

    def __init__(
        self,
        placement: Placement,
        topology: Topology,
        *,
        near: slice = slice(0, 0),
        device: torch.device | str = "cpu",
    ) -> None:
        placement.validate(topology)
        self._near = near
        self._num_slots = topology.num_slots
        self._shape = layers, logical = placement.num_layers, placement.num_logical
        # Inference tensors refuse writes outside of inference mode.
        with torch.inference_mode(False):
            self._slots = torch.full((layers, self._num_slots + 1), -1, device=device)
            # Row 0 is the id -1, no expert: one "replica" in the last column, which stays -1.
            self._first = torch.full((layers, logical + 1), self._num_slots, device=device)
            self._count = torch.ones((layers, logical + 1), dtype=torch.int64, device=device)
        self.device = self._slots.device
        self.update(placement)

    @property
    def replica_count(self) -> torch.Tensor:
        """int64 [layers, logical]: replicas that the tokens of this rank may go to."""
        return self._count[:, 1:]

    @property
    def logical_to_physical(self) -> torch.Tensor:
        """int64 [layers, logical, max replicas]: their slots, padded with -1. A copy, for inspection."""
        first, count = self._first[:, 1:], self._count[:, 1:]
        place = torch.arange(int(count.max()), device=self.device)
        index = (first[:, :, None] + place).clamp(max=self._num_slots)
        slots = self._slots[:, None].expand(-1, index.shape[1], -1).gather(2, index)
        return torch.where(place < count[:, :, None], slots, -1)

    def of_layer(self, layer: int) -> LayerTables:
        """The tables in force of one layer: views, which later placements are written to."""
        return LayerTables(self._slots[layer], self._first[layer, 1:], self._count[layer, 1:])

    def check_ids(self, layer: int, expert_ids: torch.Tensor) -> None:
        """Raise LoadError unless these are int32 or int64 [tokens, top_k] or [tokens], of a known layer."""
        if expert_ids.dim() not in (1, 2) or not 0 <= layer < self._shape[0]:
            raise LoadError(
                f"expert_ids has shape {tuple(expert_ids.shape)} for layer {layer} of {self._shape[0]}, "
                "not [tokens, top_k] or [tokens]"
            )
        if expert_ids.dtype not in _ID_DTYPES:
            raise LoadError(f"expert_ids has dtype {expert_ids.dtype}, not int32 or int64, which fit slots")

    def update(self, placement: Placement, layers: Sequence[int] | None = None) -> None:
        """Put the rows of `layers` (None: all) of `placement` in force.

        Raises:
            PlacementError: other layers, experts or slots than those of the tables.
        """
        if (placement.num_layers, placement.num_logical) != self._shape:
            raise PlacementError(f"{placement} does not fit tables of {self._shape} layers and experts")
        layers = range(self._shape[0]) if layers is None else layers
        if layers:
            rows = placement.physical_to_logical.cpu()[list(layers)]
            for layer, tables in self.prepare(rows, layers).items():
                self.write(layer, tables)

    def prepare(self, physical_to_logical: torch.Tensor, layers: Sequence[int]) -> dict[int, LayerTables]:
        """The tables of `layers`, made ahead of time for `write`.

        Args:
            physical_to_logical: int64 [len(layers), slots] on the CPU, -1 for an empty slot.
            layers: the layer of each row.

        Raises:
            PlacementError: other slots or layers than the tables', experts out of range, or an expert without
                a slot.
        """
        # Importing numba takes a while.
        from .table_kernels import list_replicas

        ids, logical = np.ascontiguousarray(physical_to_logical.numpy()), self._shape[1]
        wanted = (len(layers), self._num_slots)
        if ids.shape != wanted or ids.min() < -1 or ids.max() >= logical:
            raise PlacementError(
                f"a placement of shape {ids.shape} with experts {ids.min()}..{ids.max()} does not fit "
                f"{wanted[0]} layers of tables of {wanted[1]} slots and {logical} experts"
            )
        slots, first, count = list_replicas(ids, logical, self._near.start, self._near.stop)
        if not count.all():
            row, expert = np.argwhere(count == 0)[0]
            raise PlacementError(f"layer {layers[row]} has no slot for expert {expert} of {logical}")
        on_device = (torch.from_numpy(array).to(self.device) for array in (slots, first, count))
        return dict(zip(layers, map(LayerTables, *on_device), strict=True))

    def write(self, layer: int, tables: LayerTables) -> None:
        """Put the prepared tables of one layer in force: three copies on the device."""
        self._slots[layer].copy_(tables.slots)
        self._first[layer, 1:].copy_(tables.first)
        self._count[layer, 1:].copy_(tables.counts)
