"""Rounds: what all ranks send to each other at once, so that a hop need not be one burst."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .migration import Sends

__all__ = ["cut", "plan_rounds"]


def plan_rounds(sends: Sends, num_ranks: int, limits: Sequence[tuple[Sequence[int], int]] = ()) -> list[int]:
    """The round that each send belongs to, rising, the same on every rank.

    In a round no rank sends or receives more than any limit allows, or else a single expert. A rank that
    waits in one waits only for ranks that are on their way to it, since all go through them in order.

    Args:
        sends: of a hop.
        num_ranks: of the group.
        limits: (what one expert takes, for each layer of the hop; what a round has room for).
    """
    if not limits:
        return [0] * sends.layer.numel()
    takes = list(zip(*(each for each, _ in limits), strict=True))
    room = [most for _, most in limits]
    nothing = [0] * len(limits)
    rounds = []
    now = 0
    sent, received = [nothing] * num_ranks, [nothing] * num_ranks
    for layer, source, rank in zip(
        sends.layer.tolist(), sends.source_rank.tolist(), sends.rank.tolist(), strict=True
    ):
        fullest = map(max, sent[source], received[rank])
        if any(
            used and used + more > most for used, more, most in zip(fullest, takes[layer], room, strict=True)
        ):
            now += 1
            sent, received = [nothing] * num_ranks, [nothing] * num_ranks
        sent[source] = [used + more for used, more in zip(sent[source], takes[layer], strict=True)]
        received[rank] = [used + more for used, more in zip(received[rank], takes[layer], strict=True)]
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
