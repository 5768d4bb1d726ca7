"""Which bytes of expert weights "sampled" fingerprints look at, and reading them of many experts at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch

from ...core.splitmix import GOLDEN_GAMMA, splitmix64

__all__ = ["WORD", "is_aligned", "mixed", "sample", "sample_experts", "sampled_bytes", "sampled_words"]

WORD = 4  # bytes
_SAMPLES = 1024  # words


def sample(row: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 4 KiB at most]: the bytes of a tensor, uint8 [n, bytes], that "sampled" covers."""
    num_bytes = row.shape[1]
    if num_bytes <= _SAMPLES * WORD:
        return row
    if is_aligned(row):
        return row.view(torch.int32).index_select(1, sampled_words(num_bytes, row.device)).view(torch.uint8)
    return row.index_select(1, sampled_bytes(num_bytes, row.device))


def sample_experts(
    experts: Sequence[Sequence[torch.Tensor]],
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """What `sample` gives of each tensor, one tensor behind the other, for experts of one kind together.

    Args:
        experts: of each, at least one row: uint8 [bytes] of each of its tensors, all on one device.

    Yields:
        (indices of experts, uint8 [of these, bytes]).
    """
    # What lies in one piece of memory is read by one call, where a call for each row would take longer
    # than reading it.
    kinds: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
    for index, rows in enumerate(experts):
        kinds[tuple((row.numel(), row.data_ptr() - int(row.storage_offset())) for row in rows)].append(index)
    for alike in kinds.values():
        tensors = zip(*(experts[index] for index in alike), strict=True)
        yield alike, torch.cat([_gather(rows) for rows in tensors], 1)


def is_aligned(row: torch.Tensor) -> bool:
    """Whether uint8 [..., bytes] can be read as words where it is."""
    where = (row.shape[-1], row.storage_offset(), row.data_ptr(), *row.stride()[:-1])
    return not any(value % WORD for value in where)


@lru_cache(maxsize=256)
def sampled_bytes(num_bytes: int, device: torch.device) -> torch.Tensor:
    """int64 [4096], the positions of 1024 words: the first, the last, and one anywhere in each cell between.

    Positions at equal distances could all fall into the same few columns of a matrix.
    """
    edges = np.arange(_SAMPLES + 1) * (num_bytes // WORD) // _SAMPLES
    start, length = edges[:-1], np.diff(edges)
    first = (start + (mixed(_SAMPLES, 3) >> np.uint64(1)).astype(np.int64) % length) * WORD
    first[0], first[-1] = 0, num_bytes - WORD
    return torch.from_numpy((first[:, None] + np.arange(WORD)).flatten()).to(device)


@lru_cache(maxsize=256)
def sampled_words(num_bytes: int, device: torch.device) -> torch.Tensor:
    """int64 [1024 at most]: those words, of a tensor that consists of whole ones."""
    if num_bytes <= _SAMPLES * WORD:
        return torch.arange(num_bytes // WORD, device=device)
    return sampled_bytes(num_bytes, device)[::WORD] // WORD


def mixed(count: int, stream: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """uint64 [count]: SplitMix64 (Steele, Lea and Flood 2014) of consecutive numbers; a range per stream."""
    number = torch.arange(1, count + 1, device="cpu") + (stream << 40)
    return splitmix64(number * GOLDEN_GAMMA).numpy().view(np.uint64)


def _gather(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """uint8 [rows, 4 KiB at most]: samples of rows, uint8 [bytes], of one size in one storage."""
    row, device = rows[0], rows[0].device
    first = [int(row.storage_offset()) for row in rows]
    if not is_aligned(row) or any(place % WORD for place in first):
        chosen = sampled_bytes(row.numel(), device) if row.numel() > _SAMPLES * WORD else None
        return torch.stack([row if chosen is None else row.index_select(0, chosen) for row in rows])
    memory = row.untyped_storage()
    words = torch.empty(0, dtype=torch.int32, device=device)
    words.set_(memory, 0, (memory.nbytes() // WORD,), (1,))
    places = torch.tensor(first, device=device)[:, None] // WORD + sampled_words(row.numel(), device)
    return words.index_select(0, places.flatten()).view(torch.uint8).view(len(rows), -1)
