"""Loads as whole numbers in float64, so that every sum is exact and no device or order changes a plan.

Floating-point sums depend on their order, and the order depends on the device, the batch and the number
of threads. Sums of whole numbers below 2^53 do not. A row is scaled by a power of two and rounded once;
what is computed from it afterwards is the same on every rank.
"""

from __future__ import annotations

import torch

__all__ = ["row_hash", "to_exact", "uniform_noise"]

_TOTAL_BITS = 50  # of the sum over a row and its snapshots; leaves room for differences and doubling
_MULTIPLIERS = (
    -49064778989728563,
    -4265267296055464877,
)  # odd 64-bit constants of MurmurHash3 and SplitMix64
_STEP = -7046029254386353131  # SplitMix64's: the golden ratio, times 2^64


def to_exact(weight: torch.Tensor) -> torch.Tensor:
    """Scale each row to whole numbers whose sums are exact.

    Args:
        weight: float64 [snapshots, X, n], finite and not negative.

    Returns:
        float64 [snapshots, X, n], whole numbers; a row's sum over snapshots and items is below 2^50. Each
        row is `weight` times a power of two of its own, rounded.
    """
    snapshots, _, num_items = weight.shape
    largest = weight.amax(dim=(0, 2), keepdim=True)
    terms_bits = (snapshots * num_items).bit_length()
    exponent = (_TOTAL_BITS - terms_bits - torch.frexp(largest).exponent).to(torch.float64)
    # In two steps, since the power itself may lie outside of float64.
    half = torch.floor(exponent / 2)
    return torch.round(weight * torch.exp2(half) * torch.exp2(exponent - half))


def row_hash(exact: torch.Tensor) -> torch.Tensor:
    """A 64-bit hash of each row's content: int64 [X] of float64 [snapshots, X, n] from `to_exact`."""
    snapshots, _, num_items = exact.shape
    position = torch.arange(snapshots * num_items, device=exact.device).view(snapshots, 1, num_items)
    return _mix(exact.to(torch.int64) + position * _STEP).sum(dim=(0, 2))


def uniform_noise(
    row_seed: torch.Tensor, seed: int, candidates: torch.Tensor, num_items: int
) -> torch.Tensor:
    """Numbers in [0, 1) that depend on the row, the seed, the candidate and the item alone.

    A counter-based generator (SplitMix64: steps of a fixed odd number, mixed), so that any slice of it can
    be computed anywhere.

    Args:
        row_seed: int64 [X], from `row_hash`.
        seed: the user's seed.
        candidates: int64 [K], numbers of the candidates.
        num_items: n.

    Returns:
        float64 [X, K, n].
    """
    item = torch.arange(num_items, device=row_seed.device)
    counter = (candidates[:, None] * num_items + item) * _STEP
    bits = _mix((row_seed + _wrapped(seed * _MULTIPLIERS[1]))[:, None, None] + counter)
    return ((bits >> 11) & ((1 << 53) - 1)).to(torch.float64) * 2.0**-53


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 64-bit words that spreads every bit (xor-shift and multiply, twice)."""
    for multiplier in _MULTIPLIERS:
        x = (x ^ ((x >> 31) & ((1 << 33) - 1))) * multiplier
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _wrapped(number: int) -> int:
    """The signed 64-bit number that `number` wraps around to."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
