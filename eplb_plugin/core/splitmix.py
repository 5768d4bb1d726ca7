"""SplitMix64: pseudo-random 64-bit numbers from counters, the same on every machine and device.

Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014): the n-th number of a stream is
the mixed multiple n * GOLDEN_GAMMA. Any slice of a stream is computed alone, and no state is kept.
"""

from __future__ import annotations

import torch

__all__ = ["GOLDEN_GAMMA", "splitmix64", "uniform"]

GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
"""2^64 / golden ratio, as a signed integer: the step of a counter."""

# (shift, multiplier) of each round; multipliers as signed integers.
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))


def splitmix64(number: torch.Tensor) -> torch.Tensor:
    """Mix every bit of each word into all others: int64 of any shape to int64, a bijection."""
    for shift, multiplier in _ROUNDS:
        number = (number ^ _shifted(number, shift)) * multiplier
    return number ^ _shifted(number, 31)


def uniform(number: torch.Tensor) -> torch.Tensor:
    """The upper 53 bits of each word as a number in [0, 1): int64 of any shape to float64."""
    return _shifted(number, 11).to(torch.float64) * 2.0**-53


def _shifted(number: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical shift to the right; torch's own copies the sign bit."""
    return (number >> bits) & ((1 << (64 - bits)) - 1)
