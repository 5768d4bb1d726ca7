"""The bytes of experts in an engine: of one expert by its weights, and of moves by layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import torch

__all__ = ["ExpertBytes", "bytes_moved", "bytes_of_one_expert"]

ExpertBytes: TypeAlias = Callable[[], Mapping[int, int]]
"""Gives the bytes of one expert's weights by layer."""


def bytes_of_one_expert(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of one expert of a layer from the layer's tensors, each [slots on this rank, ...]."""
    return sum(tensor[0].numel() * tensor.element_size() for tensor in tensors)


def bytes_moved(moves: list[int], sizes: Mapping[int, int]) -> int | None:
    """Bytes of the moves of each layer; None unless the size of each moved expert is known."""
    known = all(layer in sizes for layer, count in enumerate(moves) if count)
    return sum(count * sizes.get(layer, 0) for layer, count in enumerate(moves)) if known else None
