"""Which logical expert each slot holds, and the two tables that follow from it."""

from __future__ import annotations

from functools import cached_property

import torch

from .errors import PlacementError
from .topology import Topology

__all__ = ["Placement"]

_INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Placement:
    """A frozen placement of `num_logical` experts into slots, layer by layer.

    Args:
        physical_to_logical: integer [layers, slots], the logical expert in each slot. It is copied.
        num_logical: logical experts per layer.

    Raises:
        PlacementError: wrong shape or dtype, an id outside `0..num_logical-1`, or an expert without a slot.
    """

    def __init__(self, physical_to_logical: torch.Tensor, num_logical: int) -> None:
        if not isinstance(physical_to_logical, torch.Tensor):
            raise PlacementError(
                f"physical_to_logical is a {type(physical_to_logical).__name__}, not a tensor"
            )
        if physical_to_logical.dim() != 2 or physical_to_logical.numel() == 0:
            raise PlacementError(
                f"physical_to_logical has shape {tuple(physical_to_logical.shape)}, not [layers, slots]"
            )
        if physical_to_logical.dtype not in _INTEGER_DTYPES:
            raise PlacementError(f"physical_to_logical has dtype {physical_to_logical.dtype}, not an integer")
        if num_logical < 1:
            raise PlacementError(f"num_logical={num_logical} is below 1")
        self._physical_to_logical = physical_to_logical.detach().to(torch.int64, copy=True).contiguous()
        self._num_logical = int(num_logical)
        self.validate()

    @classmethod
    def default(cls, num_layers: int, num_logical: int, num_slots: int) -> Placement:
        """The placement that engines start from: experts in order, then again from 0 in the spare slots."""
        Topology(num_ranks=1, num_slots=num_slots).check_experts(num_logical)
        row = torch.arange(num_slots) % num_logical
        return cls(row.expand(num_layers, -1), num_logical)

    @property
    def physical_to_logical(self) -> torch.Tensor:
        """int64 [layers, slots]; do not write to it."""
        return self._physical_to_logical

    @property
    def num_logical(self) -> int:
        return self._num_logical

    @property
    def num_layers(self) -> int:
        return self._physical_to_logical.shape[0]

    @property
    def num_slots(self) -> int:
        return self._physical_to_logical.shape[1]

    @property
    def device(self) -> torch.device:
        return self._physical_to_logical.device

    @cached_property
    def replica_count(self) -> torch.Tensor:
        """int64 [layers, logical]: how many slots hold each expert."""
        count = self._physical_to_logical.new_zeros(self.num_layers, self.num_logical)
        return count.scatter_add_(1, self._physical_to_logical, torch.ones_like(self._physical_to_logical))

    @cached_property
    def logical_to_physical(self) -> torch.Tensor:
        """int64 [layers, logical, max_replicas]: the slots of each expert in rising order, then -1."""
        by_expert, slots = self._physical_to_logical.sort(dim=1, stable=True)
        first = self.replica_count.cumsum(1) - self.replica_count
        replica = torch.arange(self.num_slots, device=self.device) - first.gather(1, by_expert)
        width = int(self.replica_count.max())
        table = torch.full((self.num_layers, self.num_logical * width), -1, device=self.device)
        table.scatter_(1, by_expert * width + replica, slots)
        return table.view(self.num_layers, self.num_logical, width)

    def to(self, device: torch.device | str) -> Placement:
        """The same placement with its tables on `device`."""
        if torch.device(device) == self.device:
            return self
        return Placement(self._physical_to_logical.to(device), self.num_logical)

    def with_layers(self, layers: torch.Tensor, other: Placement) -> Placement:
        """This placement with the rows `layers` (int64 or bool index) taken from `other`."""
        if other.physical_to_logical.shape != self._physical_to_logical.shape:
            raise PlacementError(
                f"placements of shapes {tuple(self._physical_to_logical.shape)} and "
                f"{tuple(other.physical_to_logical.shape)} do not mix"
            )
        rows = self._physical_to_logical.clone()
        rows[layers] = other.physical_to_logical.to(self.device)[layers]
        return Placement(rows, self.num_logical)

    def validate(self, topology: Topology | None = None) -> None:
        """Check that ids are in range, every expert has a slot and, given `topology`, slots agree with it.

        Raises:
            PlacementError: names the first layer and expert (or slot) that breaks the rule.
        """
        ids = self._physical_to_logical
        bad = (ids < 0) | (ids >= self.num_logical)
        if bool(bad.any()):
            layer, slot = (int(x) for x in bad.nonzero()[0])
            raise PlacementError(
                f"layer {layer}, slot {slot} holds expert {int(ids[layer, slot])}, "
                f"outside 0..{self.num_logical - 1}"
            )
        missing = self.replica_count == 0
        if bool(missing.any()):
            layer, expert = (int(x) for x in missing.nonzero()[0])
            raise PlacementError(f"layer {layer} has no slot for expert {expert} of {self.num_logical}")
        if topology is not None and topology.num_slots != self.num_slots:
            raise PlacementError(f"placement has {self.num_slots} slots, topology has {topology.num_slots}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        return self.num_logical == other.num_logical and torch.equal(
            self._physical_to_logical.cpu(), other._physical_to_logical.cpu()
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"Placement({self.num_layers} layers, {self.num_logical} experts in {self.num_slots} slots, "
            f"{self.device})"
        )
