"""The memory that incoming weights wait in, and what waits there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Arrival", "Staging"]


class Staging:
    """All that a transfer allocates, kept for the next one, since fresh memory costs about as much time as
    what is received into it.

    Args:
        bound: bytes that are never exceeded.
    """

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def reserve(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        """uint8 [num_bytes], whatever it held before.

        Raises:
            MemoryError: more than the bound.
        """
        if num_bytes > self.bound:
            raise MemoryError(f"{num_bytes} bytes of staging memory exceed the bound of {self.bound}")
        if self._buffer.numel() < num_bytes or self._buffer.device != device:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # two at once might not fit
            # Not an inference tensor, whatever the mode of the caller: those refuse writes outside of it.
            with torch.inference_mode(False):
                self._buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return self._buffer[:num_bytes]

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes up now."""
        return self._buffer.numel()


@dataclass(frozen=True, eq=False)
class Arrival:
    """One expert that a rank is about to use in a slot that held another.

    Attributes:
        layer: its layer.
        expert: the logical expert.
        source_slot: the slot (numbered over all ranks) that it comes from.
        rows: uint8 [bytes] of each tensor, in order; where they wait.
    """

    layer: int
    expert: int
    source_slot: int
    rows: list[torch.Tensor]
