"""`Placement`: the logical expert of each slot, with the two tables derived from it."""

from __future__ import annotations

from functools import cached_property

import torch

from .errors import PlacementError, checked_integer
from .topology import Topology

__all__ = ["Placement", "checked_ids", "slots_by_expert"]

_MOST_EXPERTS = 1024  # per slot; up to here the error can afford a table to name the missing expert
_INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Placement:
    """A frozen placement of `num_logical` experts into slots, layer by layer.

    Args:
        physical_to_logical: integer [layers, slots], the logical expert of each slot; copied. -1 is an empty
            slot, such as those of a failed rank.
        num_logical: logical experts per layer, at least 1.

    Raises:
        PlacementError: wrong shape or dtype, an id outside `-1..num_logical-1`, or an expert without a slot.
    """

    def __init__(self, physical_to_logical: torch.Tensor, num_logical: int) -> None:
        self._num_logical = checked_integer("num_logical", num_logical, PlacementError)
        self._physical_to_logical = checked_ids(physical_to_logical, self._num_logical)
        # `validate` allocates a counter for each expert.
        if self._num_logical > _MOST_EXPERTS * self.num_slots:
            raise PlacementError(f"{self.num_slots} slots are far too few for that many experts")
        self.validate()

    @classmethod
    def default(cls, num_layers: int, num_logical: int, num_slots: int) -> Placement:
        """The initial placement of engines, on the CPU: slot `s` holds expert `s % num_logical`."""
        Topology(num_ranks=1, num_slots=num_slots).check_experts(num_logical)
        num_layers = checked_integer("num_layers", num_layers, PlacementError)
        row = torch.arange(num_slots, device="cpu") % num_logical
        return cls(row.expand(num_layers, -1), num_logical)

    @property
    def physical_to_logical(self) -> torch.Tensor:
        """int64 [layers, slots], -1 for an empty slot. Read-only."""
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

    @cached_property
    def has_empty_slots(self) -> bool:
        """Whether a slot of any layer is empty."""
        return bool((self._physical_to_logical < 0).any())

    @property
    def device(self) -> torch.device:
        return self._physical_to_logical.device

    @cached_property
    def replica_count(self) -> torch.Tensor:
        """int64 [layers, logical]: slots of each expert."""
        return _count(self._physical_to_logical, self.num_logical)

    @cached_property
    def logical_to_physical(self) -> torch.Tensor:
        """int64 [layers, logical, max_replicas]: slots of each expert in rising order, padded with -1."""
        return slots_by_expert(self._physical_to_logical, self.num_logical)

    def to(self, device: torch.device | str) -> Placement:
        """The same placement on `device`."""
        if torch.device(device) == self.device:
            return self
        return Placement(self._physical_to_logical.to(device), self.num_logical)

    def with_layers(self, layers: torch.Tensor, other: Placement) -> Placement:
        """Replace the rows `layers` (int64 or bool index) by those of `other`.

        Raises:
            PlacementError: the shapes differ.
        """
        rows = self._physical_to_logical.clone()
        here, there = tuple(rows.shape), tuple(other.physical_to_logical.shape)
        if here != there:
            raise PlacementError(f"placements of shapes {here} and {there} do not mix")
        rows[layers] = other.physical_to_logical.to(self.device)[layers]
        return Placement(rows, self.num_logical)

    def validate(self, topology: Topology | None = None) -> None:
        """Check that every expert has a slot and that `topology`, if given, has as many slots.

        Raises:
            PlacementError: names the first layer and expert without a slot, or both numbers of slots.
        """
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
        held = f"{self.num_logical} experts in {self.num_slots} slots"
        return f"Placement({self.num_layers} layers, {held}, {self.device})"


def checked_ids(physical_to_logical: torch.Tensor, num_logical: int) -> torch.Tensor:
    """Validate and copy a physical-to-logical map, int64 [layers, slots]; experts may be missing.

    Raises:
        PlacementError: wrong shape or dtype, or an id outside `-1..num_logical-1`.
    """
    given, name = physical_to_logical, "physical_to_logical"
    if not isinstance(given, torch.Tensor):
        raise PlacementError(f"{name} is a {type(given).__name__}, not a tensor")
    if given.layout != torch.strided or given.is_meta:
        raise PlacementError(f"{name} is {given.layout} on {given.device}, not a strided tensor with values")
    if given.dim() != 2 or given.numel() == 0:
        raise PlacementError(f"{name} has shape {tuple(given.shape)}, not [layers, slots]")
    if given.dtype not in _INTEGER_DTYPES:
        raise PlacementError(f"{name} has dtype {given.dtype}, not an integer")
    ids = given.detach().to(torch.int64, copy=True).contiguous()
    bad = (ids < -1) | (ids >= num_logical)
    if bool(bad.any()):
        layer, slot = (int(x) for x in bad.nonzero()[0])
        held = f"layer {layer}, slot {slot} holds expert {int(ids[layer, slot])}"
        raise PlacementError(f"{held}, outside 0..{num_logical - 1} (-1 for an empty slot)")
    return ids


def slots_by_expert(physical_to_logical: torch.Tensor, num_logical: int) -> torch.Tensor:
    """Slots of each expert in rising order, padded with -1: int64 [layers, logical, max_replicas].

    Args:
        physical_to_logical: int64 [layers, slots], -1 for an empty slot; experts may be missing.
    """
    layers, num_slots = physical_to_logical.shape
    count = _count(physical_to_logical, num_logical)
    by_expert, slots = physical_to_logical.sort(dim=1, stable=True)
    # Empty slots sort first; all are written to one spare column behind the table.
    empty = num_slots - count.sum(1, keepdim=True)
    first = torch.cat([torch.zeros_like(empty), empty + count.cumsum(1) - count], dim=1)
    replica = torch.arange(num_slots, device=slots.device) - first.gather(1, by_expert + 1)
    width = max(1, int(count.max()))
    spare = num_logical * width
    place = torch.where(by_expert < 0, spare, by_expert * width + replica)
    table = torch.full((layers, spare + 1), -1, device=slots.device)
    return table.scatter_(1, place, slots)[:, :spare].reshape(layers, num_logical, width)


def _count(physical_to_logical: torch.Tensor, num_logical: int) -> torch.Tensor:
    """int64 [layers, logical]: slots of each expert. Empty slots are counted in column 0 and cut off."""
    ids = physical_to_logical + 1
    count = ids.new_zeros(ids.shape[0], num_logical + 1)
    return count.scatter_add_(1, ids, torch.ones_like(ids))[:, 1:].contiguous()
