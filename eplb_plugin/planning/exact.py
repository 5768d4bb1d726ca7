"""Loads as whole numbers in float64, so that every sum is exact on every device.

The rounding of a floating-point sum depends on its order, and the order on device, batch and threads. Sums of
whole numbers below 2^53 need no rounding. Each row is scaled by a power of two and rounded once; everything
computed from it is then the same on every rank.
"""

from __future__ import annotations

import torch

__all__ = ["to_exact"]

_TOTAL_BITS = 50  # of the sum over a row and its snapshots: room for differences and doubling below 2^53


def to_exact(weight: torch.Tensor) -> torch.Tensor:
    """Scale each row to whole numbers whose sums are exact.

    Args:
        weight: float64 [snapshots, X, n], finite and not negative.

    Returns:
        float64 [snapshots, X, n]: whole numbers, each row `weight` times its own power of two, rounded. The
        sum of a row over snapshots and items is below 2^50.
    """
    snapshots, _, num_items = weight.shape
    largest = weight.amax(dim=(0, 2), keepdim=True)
    terms_bits = (snapshots * num_items).bit_length()
    exponent = (_TOTAL_BITS - terms_bits - torch.frexp(largest).exponent).to(torch.float64)
    # The power itself may lie outside of float64: it is applied in two halves.
    half = torch.floor(exponent / 2)
    return torch.round(weight * torch.exp2(half) * torch.exp2(exponent - half))
