"""Where the host waits for the device: the one place of the tensor planner."""

from __future__ import annotations

import torch

__all__ = ["look"]


def look(numbers: torch.Tensor) -> list[float]:
    """The values of float64 [n], on the host. On a GPU this waits for all that was launched before it."""
    values: list[float] = numbers.tolist()
    return values
