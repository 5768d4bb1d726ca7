"""The dispatches by name: which replica serves which token of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch

from ..core.errors import ConfigError
from ..core.placement import Placement
from ..core.topology import Topology
from .balanced import BalancedDispatch
from .batch_split import BatchSplit, GatherCounts
from .even import EvenDispatch
from .local_first import LocalFirstDispatch

__all__ = ["DISPATCHES", "Dispatch", "Serving", "find_dispatch"]


class Dispatch(Protocol):
    """Chooses a slot for each token. Tables of a new placement are prepared beside serving, then written."""

    def physical(self, layer: int, expert_ids: torch.Tensor) -> torch.Tensor:
        """The slot of each token, numbered over all ranks; shape and dtype of `expert_ids`. -1 stays -1."""

    def physical_and_received(
        self, layer: int, expert_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `physical`, and the tokens that this rank gets: int64 [ranks, slots on this rank].

        None where they are not known."""

    def update(self, placement: Placement, layers: Sequence[int] | None = None) -> None:
        """Put the rows of `layers` (None: all) of `placement` in force."""

    def prepare(self, physical_to_logical: torch.Tensor, layers: Sequence[int]) -> Mapping[int, Any]:
        """The tables of `layers` for the rows int64 [len(layers), slots], to be handed to `write`."""

    def write(self, layer: int, tables: Any) -> None:
        """Put the prepared tables of one layer in force. Device work only."""

    def reserve(self, num_tokens: int) -> None:
        """Make room for batches of `num_tokens`, before a graph capture for instance."""


class Serving(NamedTuple):
    """The rank that a dispatch serves; each dispatch takes of it what it needs.

    Attributes:
        rank: this rank.
        device: where expert ids arrive.
        expert_cost: least cost of a replica in use, in tokens.
        gather: the counts of all ranks from those of this one; None where every rank has all tokens.
    """

    rank: int = 0
    device: torch.device | str = "cpu"
    expert_cost: int = 0
    gather: GatherCounts | None = None


def _even(placement: Placement, topology: Topology, serving: Serving) -> Dispatch:
    return EvenDispatch(placement, topology, rank=serving.rank, device=serving.device)


def _local_first(placement: Placement, topology: Topology, serving: Serving) -> Dispatch:
    return LocalFirstDispatch(placement, topology, rank=serving.rank, device=serving.device)


def _balanced(placement: Placement, topology: Topology, serving: Serving) -> Dispatch:
    return BalancedDispatch(placement, topology, BatchSplit(topology, **serving._asdict()))


DISPATCHES: Mapping[str, Callable[[Placement, Topology, Serving], Dispatch]] = MappingProxyType(
    {"even": _even, "local_first": _local_first, "balanced": _balanced}
)
"""Constructors by name."""


def find_dispatch(name: str) -> Callable[[Placement, Topology, Serving], Dispatch]:
    """The constructor of the dispatch `name`.

    Raises:
        ConfigError: there is none; the message lists the names.
    """
    try:
        return DISPATCHES[name]
    except KeyError:
        raise ConfigError(f"dispatch={name!r} is unknown; there are {', '.join(DISPATCHES)}") from None
