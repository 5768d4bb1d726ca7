"""The dispatches by name: which replica serves which token of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import torch

from ..core.errors import ConfigError
from ..core.placement import Placement
from .even import EvenDispatch
from .local_first import LocalFirstDispatch

__all__ = ["DISPATCHES", "Dispatch", "find_dispatch"]


class Dispatch(Protocol):
    """Chooses a slot for each token. Tables of a new placement are prepared beside serving, then written."""

    def physical(self, layer: int, expert_ids: torch.Tensor) -> torch.Tensor:
        """The slot of each token, numbered over all ranks; shape and dtype of `expert_ids`. -1 stays -1."""

    def update(self, placement: Placement, layers: Sequence[int] | None = None) -> None:
        """Put the rows of `layers` (None: all) of `placement` in force."""

    def prepare(self, physical_to_logical: torch.Tensor, layers: Sequence[int]) -> Mapping[int, Any]:
        """The tables of `layers` for the rows int64 [len(layers), slots], to be handed to `write`."""

    def write(self, layer: int, tables: Any) -> None:
        """Put the prepared tables of one layer in force. Device work only."""

    def reserve(self, num_tokens: int) -> None:
        """Make room for batches of `num_tokens`, before a graph capture for instance."""


DISPATCHES: Mapping[str, Callable[..., Dispatch]] = MappingProxyType(
    {"even": EvenDispatch, "local_first": LocalFirstDispatch}
)
"""Constructors by name; each takes (placement, topology, rank=, device=)."""


def find_dispatch(name: str) -> Callable[..., Dispatch]:
    """The constructor of the dispatch `name`.

    Raises:
        ConfigError: there is none; the message lists the names.
    """
    try:
        return DISPATCHES[name]
    except KeyError:
        raise ConfigError(f"dispatch={name!r} is unknown; there are {', '.join(DISPATCHES)}") from None
