"""Staging: the memory in which incoming weights wait, and the place of every expert of a batch in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import NamedTuple

import torch

from ...core.topology import Topology
from .batching import MigrationBatch
from .expert_weights import ExpertWeights, padded
from .rounds import RoundLimits, coalesce, expert_size, plan_rounds, split
from .transport import Message

__all__ = ["Arrival", "Fills", "Round", "StagedBatch", "Staging", "stage_batch"]

Fills = list[tuple[torch.Tensor, torch.Tensor]]
"""Copies of rows: (target, source), uint8 [bytes] each."""

# Arrivals are verified in groups, while later ones are on their way; smaller groups take longer in all.
_GROUPS = 2
_FEWEST = 16


class Staging:
    """The staging buffer, kept for the next transfer: fresh memory costs about as much time as receiving.

    It never exceeds `bound` bytes.
    """

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def reserve(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        """uint8 [num_bytes] with arbitrary content.

        Raises:
            MemoryError: more than the bound.
        """
        if num_bytes > self.bound:
            raise MemoryError(f"{num_bytes} bytes of staging memory exceed the bound of {self.bound}")
        if self._buffer.numel() < num_bytes or self._buffer.device != device:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # two at once might not fit
            # Inference tensors refuse writes outside of inference mode, which the caller may be in.
            with torch.inference_mode(False):
                self._buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return self._buffer[:num_bytes]

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes up now."""
        return self._buffer.numel()


@dataclass(frozen=True, eq=False)
class Arrival:
    """One logical expert that waits for its slots on this rank; `layer` is one of the model.

    Attributes:
        source_slot: its slot (numbered over all ranks) before the migration.
        rows: uint8 [bytes] of each tensor, in the staging buffer or in an untouched slot.
    """

    layer: int
    expert: int
    source_slot: int
    rows: list[torch.Tensor]


@dataclass
class Round:
    """Messages of this rank that are sent and received together.

    Attributes:
        sends: messages, and the copies that fill each of them first.
        receives: in the order in which their senders send.
        complete: (receives needed, arrival) of arrivals whose last message is in this round.
    """

    sends: list[tuple[Message, Fills]] = field(default_factory=list)
    receives: list[Message] = field(default_factory=list)
    complete: list[tuple[int, Arrival]] = field(default_factory=list)

    def verification_groups(self) -> Iterator[tuple[int, list[Arrival]]]:
        """Arrivals that are verified together, and the number of receives that they need."""
        size = max(_FEWEST, -(-len(self.complete) // _GROUPS))
        ordered = sorted(self.complete, key=itemgetter(0))
        for first in range(0, len(ordered), size):
            group = ordered[first : first + size]
            yield group[-1][0], [arrival for _, arrival in group]

    @property
    def num_bytes(self) -> int:
        """Of the busier direction."""
        messages = [message for message, _ in self.sends], self.receives
        return max(sum(message.tensor.numel() for message in direction) for direction in messages)


@dataclass(frozen=True, eq=False)
class StagedBatch:
    """A migration batch on this rank, with a place in the staging buffer for each expert.

    Attributes:
        rounds: sends and receives.
        local: arrivals from slots of this rank.
        fills: copies that stage those of them whose source slot is overwritten; one item an expert.
        writes: for each layer, copies from the staged experts to their slots.
    """

    rounds: list[Round]
    local: list[Arrival]
    fills: list[Fills]
    writes: dict[int, Fills]


class _Transfer(NamedTuple):
    """One expert that this rank sends to or receives from `peer`; `layer` is an index into the batch."""

    peer: int
    round: int
    layer: int
    rows: list[torch.Tensor]


class _Space(NamedTuple):
    """The space of a coalesced row in a message; None for a row that is sent from its own memory."""

    transfer: int
    row: int
    space: torch.Tensor | None


class _Memory:
    """The slots of this rank in the layers of a batch, and the part of the buffer that is still free."""

    def __init__(
        self, layers: Sequence[int], weights: ExpertWeights, slots: slice, buffer: torch.Tensor
    ) -> None:
        self._first = slots.start
        self._slots = [list(zip(*(row.unbind() for row in weights.rows[n]), strict=True)) for n in layers]
        self.coalesced = [weights.coalesced[layer] for layer in layers]
        self.alone = [
            [index for index in range(len(weights.rows[layer])) if index not in weights.coalesced[layer]]
            for layer in layers
        ]
        self._buffer, self._used = buffer, 0

    def slot(self, layer: int, slot: int) -> list[torch.Tensor]:
        """uint8 [bytes] of each tensor of a slot of this rank."""
        return list(self._slots[layer][slot - self._first]) if self._slots[layer] else []

    def take(self, num_bytes: int) -> torch.Tensor:
        self._used += num_bytes
        return self._buffer[self._used - num_bytes : self._used]

    def take_rows(self, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [self.take(padded(row))[: row.numel()] for row in rows]

    def received(self, layer: int) -> list[torch.Tensor]:
        """Space for an expert's rows; coalesced rows get theirs with their messages, and are any slot's."""
        rows = self.slot(layer, self._first)
        for index in self.alone[layer]:
            (rows[index],) = self.take_rows([rows[index]])
        return rows


def stage_batch(
    batch: MigrationBatch,
    weights: ExpertWeights,
    topology: Topology,
    rank: int,
    buffer: torch.Tensor,
    limits: RoundLimits,
) -> StagedBatch:
    """Give every expert of the batch its place. Reads and writes no weights, and waits for no rank.

    Args:
        batch, limits: the same on every rank.
        weights: of this rank.
        buffer: uint8 [batch.staging_bytes[rank]].
    """
    layers, plan = batch.layers, batch.migration
    sends, copies = plan.sends, plan.copies
    memory = _Memory(layers, weights, topology.slots_of_rank(rank), buffer)
    outgoing: list[_Transfer] = []
    incoming: list[_Transfer] = []
    arrivals: dict[int, Arrival] = {}  # by send, in the order of `incoming`
    sizes = [expert_size(weights, layer) for layer in layers]
    numbers = plan_rounds(sends, topology.num_ranks, sizes, limits)
    for send, layer, expert, sender, source_slot, receiver in _chosen(
        (sends.source_rank == rank) | (sends.rank == rank), sends
    ):
        if sender == rank:
            outgoing.append(_Transfer(receiver, numbers[send], layer, memory.slot(layer, source_slot)))
        if receiver == rank:
            rows = memory.received(layer)
            incoming.append(_Transfer(sender, numbers[send], layer, rows))
            arrivals[send] = Arrival(layers[layer], expert, source_slot, rows)
    rounds = _make_rounds(memory, outgoing, incoming, list(arrivals.values()), limits.num_bytes)

    writes: dict[int, Fills] = {layer: [] for layer in layers}
    local: list[Arrival] = []
    fills: list[Fills] = []
    index = {layer: number for number, layer in enumerate(layers)}
    for _, send, slot in _chosen((sends.rank == rank)[plan.arrivals.send], plan.arrivals):
        arrival = arrivals[send]
        target = memory.slot(index[arrival.layer], slot)
        writes[arrival.layer] += zip(target, arrival.rows, strict=True)
    for _, layer, _, source_slot, slot, staged in _chosen(copies.rank == rank, copies):
        rows = source = memory.slot(layer, source_slot)
        # Slots that keep their expert are read at the commit.
        if staged:
            rows = memory.take_rows(source)
            fills.append(list(zip(rows, source, strict=True)))
        local.append(Arrival(layers[layer], int(batch.physical_to_logical[layer, slot]), source_slot, rows))
        writes[layers[layer]] += zip(memory.slot(layer, slot), rows, strict=True)
    return StagedBatch(rounds, local, fills, writes)


def _make_rounds(
    memory: _Memory,
    outgoing: Sequence[_Transfer],
    incoming: Sequence[_Transfer],
    arrivals: Sequence[Arrival],
    most: int | None,
) -> list[Round]:
    """The rounds of this rank, each of its parts as a round of its own; coalesced rows get their space.

    `arrivals`: of the incoming transfers. `most`: bytes of a message that a row has for itself.
    """
    rounds: dict[tuple[int, int], Round] = defaultdict(Round)
    for key, message, spaces in _messages(memory, outgoing, most):
        fills = [(space, outgoing[number].rows[row]) for number, row, space in spaces if space is not None]
        rounds[key].sends.append((message, fills))
    last: dict[int, tuple[tuple[int, int], int]] = {}
    for key, message, spaces in _messages(memory, incoming, most):
        rounds[key].receives.append(message)
        for number, row, space in spaces:
            if space is not None:
                incoming[number].rows[row] = space
            last[number] = max(last.get(number, (key, 0)), (key, len(rounds[key].receives)))
    for number, (key, receives) in last.items():
        rounds[key].complete.append((receives, arrivals[number]))
    return [rounds[key] for key in sorted(rounds)]


def _messages(
    memory: _Memory, transfers: Sequence[_Transfer], most: int | None
) -> Iterator[tuple[tuple[int, int], Message, list[_Space]]]:
    """((round, part), message, rows in it) of one direction.

    Both ends of a pair get the same messages in the same order: these follow from rounds and sizes alone.
    """
    coalesced: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for number, (peer, round_number, layer, rows) in enumerate(transfers):
        coalesced[round_number, peer] += [(number, row) for row in memory.coalesced[layer]]
        alone = memory.alone[layer]
        for part, at, first, end in split([rows[row].numel() for row in alone], most):
            row = rows[alone[at]]
            tensor = row if end - first == row.numel() else row[first:end]
            yield (round_number, part), Message(peer, tensor), [_Space(number, alone[at], None)]
    for (round_number, peer), entries in coalesced.items():
        originals = [transfers[number].rows[row] for number, row in entries]
        sizes = [padded(row) for row in originals]
        for run in coalesce(sizes):
            tensor = memory.take(sum(sizes[run]))
            spaces = [
                _Space(number, row, space if space.numel() == original.numel() else space[: original.numel()])
                for (number, row), original, space in zip(
                    entries[run], originals[run], tensor.split_with_sizes(sizes[run]), strict=True
                )
            ]
            yield (round_number, 0), Message(peer, tensor), spaces


def _chosen(mask: torch.Tensor, table: Iterable[torch.Tensor]) -> Iterator[tuple[int, ...]]:
    """(index, values) of the rows of a table, given by its columns, for which bool [rows] is true."""
    indices = mask.nonzero().flatten()
    return zip(indices.tolist(), *(column[indices].tolist() for column in table), strict=True)
