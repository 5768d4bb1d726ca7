"""Rounds and messages of a migration batch, as numbers: which bytes travel together.

All ranks compute the same from the same plan. So both ends of a pair of ranks know the order of their
messages, and no message needs a tag.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from .expert_weights import ExpertWeights
from .migration import Sends

__all__ = ["Chunk", "RoundLimits", "coalesce", "expert_size", "plan_rounds", "split"]

# Size of a message of coalesced rows, about: one is on its way while the next is filled.
_COALESCED = 2 << 20  # bytes


class RoundLimits(NamedTuple):
    """Most that a rank sends, and most that it receives, in one round; None is no limit.

    Example: 2 MiB and experts of 0.6 MiB make rounds of at most three experts for each rank and direction. A
    single expert may exceed the limits.
    """

    num_bytes: int | None = None
    messages: int | None = None


class Chunk(NamedTuple):
    """Bytes `first` to `end - 1` of row number `row`, in one message; parts of a round follow each other."""

    part: int
    row: int
    first: int
    end: int


def expert_size(weights: ExpertWeights, layer: int) -> tuple[int, int]:
    """Bytes of one expert of the layer, and messages at most."""
    coalesced = -(-weights.coalesced_bytes[layer] // _COALESCED)
    alone = len(weights.rows[layer]) - len(weights.coalesced[layer])
    return weights.expert_bytes[layer], alone + coalesced


def plan_rounds(
    sends: Sends, num_ranks: int, sizes: Sequence[tuple[int, int]], limits: RoundLimits
) -> list[int]:
    """The round of each send, rising; the same on every rank.

    Every rank goes through the rounds in order. So a rank waits only for ranks on their way to its round.

    Args:
        sizes: for each layer of the batch of `sends`, bytes and messages of one expert.
    """
    if limits == RoundLimits():
        return [0] * sends.layer.numel()
    most = [math.inf if limit is None else limit for limit in limits]
    rounds: list[int] = []
    current = 0
    sent, received = [(0, 0)] * num_ranks, [(0, 0)] * num_ranks
    for layer, source, rank in zip(
        sends.layer.tolist(), sends.source_rank.tolist(), sends.rank.tolist(), strict=True
    ):
        num_bytes, messages = sizes[layer]
        after = [(used[0] + num_bytes, used[1] + messages) for used in (sent[source], received[rank])]
        fits = all(total <= limit for used in after for total, limit in zip(used, most, strict=True))
        if not fits and after != [sizes[layer]] * 2:
            current += 1
            sent, received = [(0, 0)] * num_ranks, [(0, 0)] * num_ranks
            after = [sizes[layer]] * 2
        sent[source], received[rank] = after
        rounds.append(current)
    return rounds


def split(sizes: Sequence[int], most: int | None) -> Iterator[Chunk]:
    """Chunks of an expert's rows, at most `most` bytes each; parts of a round have about as many.

    Args:
        sizes: bytes of each row.
        most: None leaves rows whole, in one part.
    """
    before = 0
    for row, size in enumerate(sizes):
        for first in range(0, size, most or size):
            part = (before + first) // most if most else 0
            yield Chunk(part, row, first, min(first + (most or size), size))
        before += size


def coalesce(sizes: Sequence[int]) -> Iterator[slice]:
    """Runs of rows that share a message: about equal bytes in each, 2 MiB as near as possible.

    Args:
        sizes: bytes of each row, with alignment.
    """
    ends = list(accumulate(sizes, initial=0))
    messages = max(1, round(ends[-1] / _COALESCED))
    cuts = {bisect_left(ends, ends[-1] * number // messages) for number in range(messages + 1)}
    for first, end in pairwise(sorted(cuts)):
        yield slice(first, end)
