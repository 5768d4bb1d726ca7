"""Rounds: what all ranks send to each other at once, so that a hop need not be one burst."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..migration import Sends

__all__ = ["cut", "plan_rounds"]


def plan_rounds(sends: Sends, expert_bytes: Sequence[int], num_ranks: int, piece: int | None) -> list[int]:
    """The round that each send belongs to, rising, the same on every rank.

    In a round no rank sends or receives more than `piece` bytes, or else a single expert. A rank that waits
    in one waits only for ranks that are on their way to it, since all go through them in order.

    Args:
        sends: of a hop.
        expert_bytes: of one expert, for each layer of the hop.
        num_ranks: of the group.
        piece: bytes; None is all at once.
    """
    if piece is None:
        return [0] * sends.layer.numel()
    rounds = []
    now = 0
    sent, received = [0] * num_ranks, [0] * num_ranks
    for layer, source, rank in zip(
        sends.layer.tolist(), sends.source_rank.tolist(), sends.rank.tolist(), strict=True
    ):
        num_bytes = expert_bytes[layer]
        fullest = max(sent[source], received[rank])
        if fullest and fullest + num_bytes > piece:
            now += 1
            sent, received = [0] * num_ranks, [0] * num_ranks
        sent[source] += num_bytes
        received[rank] += num_bytes
        rounds.append(now)
    return rounds


def cut(sizes: Sequence[int], piece: int | None) -> Iterator[tuple[int, int, int, int]]:
    """Cut an expert's tensors: (part of the round, tensor, first byte, last byte + 1), at most `piece` bytes.

    Args:
        sizes: bytes of each tensor.
        piece: None leaves them whole, in one part.
    """
    before = 0
    for tensor, size in enumerate(sizes):
        step = piece or size
        for first in range(0, size, step):
            part = (before + first) // piece if piece else 0
            yield part, tensor, first, min(first + step, size)
        before += size
