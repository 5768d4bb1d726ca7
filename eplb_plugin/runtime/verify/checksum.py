"""Checksums of rows of bytes: 64-bit sums of words times fixed factors, over all bytes or sampled ones.

A row is read as little-endian words of 4 bytes, in blocks of 64 KiB. Its checksum is the sum over blocks of
(block factor * sum of word factor * word), modulo 2**64. Factors are odd and pseudo-random.

Two implementations give the same result. On the CPU a compiled pass reads words in place. Torch serves GPUs,
and rows that are not whole words.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from ...core.splitmix import GOLDEN_GAMMA, splitmix64

__all__ = ["BLOCK", "checksum_at", "checksum_rows", "sample", "sample_experts", "sampled_bytes"]

WORD = 4  # bytes
BLOCK = 16 * 1024  # words
_SAMPLES = 1024  # words of a tensor
# Blocks whose products are in memory together: 4 MiB, which a cache holds, and 32 MiB for few launches.
_AT_ONCE = {"cpu": 32, "cuda": 256}
_CPU = torch.device("cpu")
_WORD_FACTORS, _BLOCK_FACTORS, _POSITIONS = 1, 2, 3  # streams of pseudo-random numbers

_Ints = npt.NDArray[np.int64]


def checksum_rows(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Checksums of several experts, with torch: int64 [experts], on the device of `rows`.

    `rows`: for each tensor, at least one, uint8 [experts, bytes], on one device; rows may lie apart.
    """
    count, device = rows[0].shape[0], rows[0].device
    num_blocks = sum(-(-row.shape[1] // (BLOCK * WORD)) for row in rows)
    of_word = _factors(BLOCK, _WORD_FACTORS, device)
    of_block = _factors(num_blocks, _BLOCK_FACTORS, device)
    total = torch.zeros(count, dtype=torch.int64, device=device)
    products = torch.empty(0, dtype=torch.int64, device=device)
    done = 0
    for row in rows:
        for piece in _whole_blocks(row, max(1, _AT_ONCE[device.type] // max(count, 1))):
            words = _words(piece)
            width = min(words.shape[1], BLOCK)
            words = words.view(count, words.shape[1] // width, width)
            # Fresh memory for each product would cost the CPU more than the multiplication.
            products = torch.mul(words, of_word[:width], out=products.resize_(words.shape))
            sums = products.sum(2)
            total += (sums * of_block[done : done + sums.shape[1]]).sum(1)
            done += sums.shape[1]
    return total


def checksum_at(addresses: _Ints, sizes: tuple[int, ...], *, sampled: bool) -> _Ints | None:
    """Checksums of several experts in CPU memory, compiled: int64 [experts].

    None: rows are not whole aligned words.

    Args:
        addresses: int64 [experts, tensors], of the first byte of each row.
        sizes: bytes of a row of each tensor.
        sampled: over the sampled words of all tensors, one tensor behind the other.
    """
    # numba takes a while to import.
    from . import checksum_kernels

    if any(size % WORD for size in sizes) or (addresses % WORD).any():
        return None
    sums = np.empty(len(addresses), np.int64)
    if sampled:
        checksum_kernels.sum_samples(addresses, *_samples(sizes), sums)
    else:
        num_words = np.array(sizes, np.int64) // WORD
        num_blocks = int((-(-num_words // BLOCK)).sum())
        of_word = _factors(BLOCK, _WORD_FACTORS, _CPU).numpy()
        of_block = _factors(num_blocks, _BLOCK_FACTORS, _CPU).numpy()
        checksum_kernels.sum_blocks(addresses, num_words, of_word, of_block, sums)
    return sums


def sample(row: torch.Tensor) -> torch.Tensor:
    """The sampled bytes of a tensor: uint8 [n, 4 KiB at most] of uint8 [n, bytes]."""
    num_bytes = row.shape[1]
    if num_bytes <= _SAMPLES * WORD:
        return row
    if _is_aligned(row):
        return row.view(torch.int32).index_select(1, _sampled_words(num_bytes, row.device)).view(torch.uint8)
    return row.index_select(1, sampled_bytes(num_bytes, row.device))


def sample_experts(experts: Sequence[Sequence[torch.Tensor]]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """(indices of experts, uint8 [these experts, bytes]): the sampled bytes of many experts, those of one
    expert's tensors behind each other.

    `experts`: of each, at least one row: uint8 [bytes] of each of its tensors, all on one device.
    """
    # One call gathers all rows of one storage; a call for each row would take longer than the read.
    kinds: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
    for index, rows in enumerate(experts):
        kinds[tuple((row.numel(), row.data_ptr() - int(row.storage_offset())) for row in rows)].append(index)
    for alike in kinds.values():
        tensors = zip(*(experts[index] for index in alike), strict=True)
        yield alike, torch.cat([_gather(rows) for rows in tensors], 1)


@lru_cache(maxsize=256)
def sampled_bytes(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Positions of 1024 sampled words, int64 [4096]: the first word, the last, and a random one in each
    1024th between.

    Equal distances could hit the same few columns of a matrix.
    """
    edges = np.arange(_SAMPLES + 1) * (num_bytes // WORD) // _SAMPLES
    start, length = edges[:-1], np.diff(edges)
    first = (start + (_splitmix64(_SAMPLES, _POSITIONS) >> np.uint64(1)).astype(np.int64) % length) * WORD
    first[0], first[-1] = 0, num_bytes - WORD
    return torch.from_numpy((first[:, None] + np.arange(WORD)).flatten()).to(device)


@lru_cache(maxsize=256)
def _sampled_words(num_bytes: int, device: torch.device) -> torch.Tensor:
    """The same positions in words, int64 [1024 at most], of a tensor of whole words."""
    if num_bytes <= _SAMPLES * WORD:
        return torch.arange(num_bytes // WORD, device=device)
    return sampled_bytes(num_bytes, device)[::WORD] // WORD


@lru_cache(maxsize=256)
def _samples(sizes: tuple[int, ...]) -> tuple[_Ints, _Ints, _Ints]:
    """(int64 [tensors], samples up to the end of each; int64 [samples], words from the start of its tensor;
    int64 [samples], its factor)."""
    words = [_sampled_words(size, _CPU).numpy() for size in sizes]
    ends = np.cumsum([len(places) for places in words])
    blocks = -(-int(ends[-1]) // BLOCK)
    of_block = _factors(blocks, _BLOCK_FACTORS, _CPU).numpy()
    factors = np.multiply.outer(of_block, _factors(BLOCK, _WORD_FACTORS, _CPU).numpy())
    return ends, np.concatenate(words), factors.reshape(-1)[: ends[-1]]


def _gather(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sampled bytes, uint8 [rows, 4 KiB at most], of rows, uint8 [bytes], of one size in one storage."""
    row, device = rows[0], rows[0].device
    first = [int(row.storage_offset()) for row in rows]
    if not _is_aligned(row) or any(place % WORD for place in first):
        return torch.cat([sample(row.unsqueeze(0)) for row in rows])
    memory = row.untyped_storage()
    words = torch.empty(0, dtype=torch.int32, device=device)
    words.set_(memory, 0, (memory.nbytes() // WORD,), (1,))
    places = torch.tensor(first, device=device)[:, None] // WORD + _sampled_words(row.numel(), device)
    return words.index_select(0, places.flatten()).view(torch.uint8).view(len(rows), -1)


def _whole_blocks(row: torch.Tensor, most: int) -> Iterator[torch.Tensor]:
    """Cut [n, bytes] into runs of at most `most` whole blocks, and the rest."""
    block = BLOCK * WORD
    whole = row.shape[1] // block * block
    for first, last in pairwise([*range(0, whole, most * block), whole, row.shape[1]]):
        if first < last:
            yield row[:, first:last]


def _words(piece: torch.Tensor) -> torch.Tensor:
    """int32 [n, words]: the bytes in place if they are aligned, else a copy, filled up with zeros."""
    count, num_bytes = piece.shape
    if not _is_aligned(piece):
        padded = piece.new_zeros(count, -(-num_bytes // WORD) * WORD)
        padded[:, :num_bytes] = piece
        piece = padded
    return piece.view(torch.int32)


def _is_aligned(row: torch.Tensor) -> bool:
    """Whether uint8 [..., bytes] can be read as words in place."""
    values = (row.shape[-1], row.storage_offset(), row.data_ptr(), *row.stride()[:-1])
    return not any(value % WORD for value in values)


def _factors(count: int, stream: int, device: torch.device) -> torch.Tensor:
    """int64 [count], odd, the same on every machine."""
    return _all_factors(1 << count.bit_length(), stream, device)[:count]


@lru_cache(maxsize=64)
def _all_factors(count: int, stream: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy((_splitmix64(count, stream) | np.uint64(1)).view(np.int64)).to(device)


def _splitmix64(count: int, stream: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """uint64 [count]: SplitMix64 (Steele, Lea and Flood 2014) of consecutive numbers; a range per stream."""
    number = torch.arange(1, count + 1, device="cpu") + (stream << 40)
    return splitmix64(number * GOLDEN_GAMMA).numpy().view(np.uint64)
