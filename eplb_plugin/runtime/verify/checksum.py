"""Sums over blocks of words, each word and each block by a factor of its own: what a fingerprint is.

On the CPU a compiled pass reads words where they are. Tensors on a GPU, and rows that are no whole words, go
through torch, which gives the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from .samples import WORD, is_aligned, mixed, sampled_words

__all__ = ["BLOCK", "sum_at", "sum_rows"]

BLOCK = 16 * 1024  # words
# Blocks whose products are in memory together: 4 MiB, which a cache holds, and 32 MiB for few launches.
_AT_ONCE = {"cpu": 32, "cuda": 256}
_CPU = torch.device("cpu")

Array = np.ndarray[Any, np.dtype[np.int64]]


def sum_rows(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sums of several items, with torch.

    Args:
        rows: for each tensor, at least one, uint8 [items, bytes], on one device; rows may lie apart.

    Returns:
        int64 [items], on that device.
    """
    count, device = rows[0].shape[0], rows[0].device
    num_blocks = sum(-(-row.shape[1] // (BLOCK * WORD)) for row in rows)
    of_word, of_block = _factors(BLOCK, 1, device), _factors(num_blocks, 2, device)
    total = torch.zeros(count, dtype=torch.int64, device=device)
    products = torch.empty(0, dtype=torch.int64, device=device)
    done = 0
    for row in rows:
        for piece in _pieces(row, max(1, _AT_ONCE[device.type] // max(count, 1))):
            words = _words(piece)
            width = min(words.shape[1], BLOCK)
            words = words.view(count, words.shape[1] // width, width)
            # Fresh memory for each product would cost the CPU more than multiplying.
            products = torch.mul(words, of_word[:width], out=products.resize_(words.shape))
            sums = products.sum(2)
            total += (sums * of_block[done : done + sums.shape[1]]).sum(1)
            done += sums.shape[1]
    return total


def sum_at(addresses: Array, sizes: tuple[int, ...], *, sampled: bool) -> Array | None:
    """The sums of several items in the memory of the CPU, compiled; None where rows are no whole words.

    Args:
        addresses: int64 [items, tensors], where rows begin.
        sizes: bytes of a row of each tensor.
        sampled: of the words that samples consist of, one tensor's behind the other's.

    Returns:
        int64 [items].
    """
    # Importing numba takes a while.
    from . import checksum_kernels as word_kernels

    if any(size % WORD for size in sizes) or (addresses % WORD).any():
        return None
    sums = np.empty(len(addresses), np.int64)
    if sampled:
        word_kernels.sum_samples(addresses, *_samples(sizes), sums)
    else:
        num_words = np.array(sizes, np.int64) // WORD
        num_blocks = int((-(-num_words // BLOCK)).sum())
        factors = _factors(BLOCK, 1, _CPU).numpy(), _factors(num_blocks, 2, _CPU).numpy()
        word_kernels.sum_blocks(addresses, num_words, *factors, sums)
    return sums


@lru_cache(maxsize=256)
def _samples(sizes: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """(int64 [tensors], the samples up to the end of each; int64 [samples], which word of its tensor each is;
    int64 [samples], its factor)."""
    words = [sampled_words(size, _CPU).numpy() for size in sizes]
    ends = np.cumsum([len(places) for places in words])
    blocks = -(-int(ends[-1]) // BLOCK)
    factors = np.multiply.outer(_factors(blocks, 2, _CPU).numpy(), _factors(BLOCK, 1, _CPU).numpy())
    return ends, np.concatenate(words), factors.reshape(-1)[: ends[-1]]


def _pieces(row: torch.Tensor, blocks: int) -> Iterator[torch.Tensor]:
    """Cut [n, bytes] into runs of whole blocks, `blocks` at most, and what is left over."""
    block = BLOCK * WORD
    whole = row.shape[1] // block * block
    for first, last in pairwise([*range(0, whole, blocks * block), whole, row.shape[1]]):
        if first < last:
            yield row[:, first:last]


def _words(piece: torch.Tensor) -> torch.Tensor:
    """int32 [n, words]: the bytes themselves where they are aligned, else a copy, filled up with zeros."""
    count, num_bytes = piece.shape
    if not is_aligned(piece):
        padded = piece.new_zeros(count, -(-num_bytes // WORD) * WORD)
        padded[:, :num_bytes] = piece
        piece = padded
    return piece.view(torch.int32)


def _factors(count: int, stream: int, device: torch.device) -> torch.Tensor:
    """int64 [count], odd, the same on every machine."""
    return _made_factors(1 << count.bit_length(), stream, device)[:count]


@lru_cache(maxsize=64)
def _made_factors(count: int, stream: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy((mixed(count, stream) | np.uint64(1)).view(np.int64)).to(device)
