"""Where a rank stages what it sends and receives in a hop, and the messages that carry it."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from operator import itemgetter

import numpy as np
import numpy.typing as npt
import torch

from ...core.topology import Topology
from .batching import Hop
from .expert_weights import ExpertWeights, is_packed, padded
from .rounds import cut, plan_rounds
from .staging import Arrival
from .transport import Message

__all__ = ["Fills", "Layout", "Round"]

Fills = list[tuple[torch.Tensor, torch.Tensor]]
"""What to copy: (target, source)."""

# Bytes of a message that small rows share, about: one is on its way while the next is filled.
_SHARED = 2 << 20
# Arrivals are checked in lots, while what comes after them is on its way; smaller ones would take longer.
_LOTS = 2
_FEWEST = 16


@dataclass
class Round:
    """What this rank sends and receives at once.

    Attributes:
        sends: and how each of them is filled.
        receives: in the order in which their senders send.
        whole: arrivals that are complete with a receive: (how many receives that are, arrival).
    """

    sends: list[tuple[Message, Fills]] = field(default_factory=list)
    receives: list[Message] = field(default_factory=list)
    whole: list[tuple[int, Arrival]] = field(default_factory=list)

    def lots(self) -> Iterator[tuple[int, list[Arrival]]]:
        """Arrivals that are checked together, and how many receives have to be there for them."""
        enough = max(_FEWEST, -(-len(self.whole) // _LOTS))
        ordered = sorted(self.whole, key=itemgetter(0))
        for first in range(0, len(ordered), enough):
            lot = ordered[first : first + enough]
            yield lot[-1][0], [arrival for _, arrival in lot]

    @property
    def num_bytes(self) -> int:
        """Of the busier direction."""
        messages = [message for message, _ in self.sends], self.receives
        return max(sum(message.tensor.numel() for message in direction) for direction in messages)


class Layout:
    """Both ends of a pair list its sends in the order of the plan, so messages match without tags.

    Args:
        hop: the same on every rank.
        weights: what this rank holds.
        topology: gives the slots of a rank.
        rank: this rank.
        piece: bytes that are sent at once; None is everything.
        most: messages of a direction that are sent at once, as far as one expert has no more; None is any
            number.

    Attributes:
        num_bytes: staging memory that this rank needs.
        moves: for each expert that is sent from rank to rank, over all ranks: its layer.
        rounds: once placed, as all that follow.
        local: arrivals from slots of this rank.
        fills: what to copy for these, in pieces of work.
        writes: by layer: (slot, uint8 [bytes] of each tensor that it gets).
    """

    def __init__(
        self,
        hop: Hop,
        weights: ExpertWeights,
        topology: Topology,
        rank: int,
        piece: int | None = None,
        most: int | None = None,
    ) -> None:
        plan = hop.migration
        self._layers = hop.layers
        self._first = topology.slots_of_rank(rank).start
        self._after = hop.after
        self._piece = piece
        sends, copies = plan.sends, plan.copies
        self.moves = [hop.layers[layer] for layer in sends.layer.tolist()]
        # Which tensors have messages of their own, and which share one.
        tensors = [weights.rows[layer] for layer in hop.layers]
        self._own = [[index for index, rows in enumerate(layer) if not is_packed(rows)] for layer in tensors]
        self._small = [[index for index, rows in enumerate(layer) if is_packed(rows)] for layer in tensors]
        limits = []
        if piece is not None:
            limits.append(([weights.expert_bytes(layer) for layer in hop.layers], piece))
        if most is not None:
            # Those of several experts to one rank share messages, of which there are no more than this.
            shared = [-(-weights.packed_bytes(layer) // _SHARED) for layer in hop.layers]
            limits.append(([len(own) + few for own, few in zip(self._own, shared, strict=True)], most))
        rounds = np.array(plan_rounds(sends, topology.num_ranks, limits), np.int64)

        from_here, to_here = sends.source_rank.numpy() == rank, sends.rank.numpy() == rank
        self._outgoing = _entries(from_here, sends.rank, sends.layer, sends.source_slot, rounds)
        self._incoming = _entries(
            to_here,
            sends.source_rank,
            sends.layer,
            sends.expert,
            sends.source_slot,
            rounds,
            np.arange(plan.num_sends),
        )
        # One entry per slot that a send fills.
        self._targets: dict[int, list[int]] = defaultdict(list)
        for send, slot in _entries(
            to_here[plan.arrivals.send.numpy()], plan.arrivals.send, plan.arrivals.slot
        ):
            self._targets[send].append(slot)
        self._copies = _entries(
            copies.rank.numpy() == rank, copies.layer, copies.source_slot, copies.slot, copies.staged
        )
        self.num_bytes = (
            sum(weights.staged_bytes(self._layers[incoming[1]]) for incoming in self._incoming)
            + sum(weights.staged_bytes(self._layers[layer]) for layer, _, _, staged in self._copies if staged)
            + sum(weights.packed_bytes(self._layers[outgoing[1]]) for outgoing in self._outgoing)
        )
        # Of each layer: its slots, and of each of these its tensors, uint8 [bytes].
        self._slots = [list(zip(*(rows.unbind() for rows in layer), strict=True)) for layer in tensors]
        self.rounds: list[Round] = []
        self.local: list[Arrival] = []
        self.fills: list[Fills] = []
        self.writes: dict[int, list[tuple[int, Sequence[torch.Tensor]]]] = defaultdict(list)
        # By round and part of it.
        self._parts: dict[tuple[int, int], Round] = defaultdict(Round)
        # The part, and how many of its receives, that an arrival is complete with.
        self._last: dict[Arrival, tuple[tuple[int, int], int]] = {}

    def place(self, buffer: torch.Tensor) -> None:
        """Say where in the buffer everything goes. Reads and writes no weights, and waits for nobody.

        Args:
            buffer: uint8 [num_bytes].
        """
        used = 0

        def take(num_bytes: int) -> torch.Tensor:
            nonlocal used
            used += num_bytes
            return buffer[used - num_bytes : used]

        self._place_sends(take)
        self._place_receives(take)
        # Slots that nothing writes to are read when they are committed, without a detour.
        for layer, source_slot, slot, staged in self._copies:
            rows = self._slot(layer, source_slot)
            if staged:
                spaces = [take(padded(row))[: row.numel()] for row in rows]
                self.fills.append(list(zip(spaces, rows, strict=True)))
                rows = spaces
            expert = int(self._after[layer, slot])
            self.local.append(Arrival(self._layers[layer], expert, source_slot, list(rows)))
            self.writes[self._layers[layer]].append((slot, rows))
        self.rounds = [self._parts[key] for key in sorted(self._parts)]

    def targets(self, layer: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What to write to the slots of a layer: (uint8 [bytes] of the slot, what it gets)."""
        row = self._layers.index(layer)
        for slot, staged in self.writes[layer]:
            yield from zip(self._slot(row, slot), staged, strict=True)

    def _slot(self, row: int, slot: int) -> Sequence[torch.Tensor]:
        """What a slot of this rank holds, of a layer of the hop: uint8 [bytes] of each tensor."""
        slots = self._slots[row]
        return slots[slot - self._first] if slots else ()

    def _place_sends(self, take: Callable[[int], torch.Tensor]) -> None:
        packs: dict[tuple[int, int], list[torch.Tensor]] = defaultdict(list)
        for receiver, layer, source_slot, number in self._outgoing:
            rows = self._slot(layer, source_slot)
            packs[number, receiver] += [rows[index] for index in self._small[layer]]
            for part, piece in self._cut([rows[index] for index in self._own[layer]]):
                self._parts[number, part].sends.append((Message(receiver, piece), []))
        for (number, receiver), small in packs.items():
            for message, shared, spaces in _pack(take, small):
                fills = list(zip(spaces, small[shared], strict=True))
                self._parts[number, 0].sends.append((Message(receiver, message), fills))

    def _place_receives(self, take: Callable[[int], torch.Tensor]) -> None:
        packs: dict[tuple[int, int], list[tuple[Arrival, int]]] = defaultdict(list)
        for sender, layer, expert, source_slot, number, send in self._incoming:
            # Any slot will do: what counts is how large its rows are.
            rows = list(self._slot(layer, self._first))
            arrival = Arrival(self._layers[layer], expert, source_slot, rows)
            packs[number, sender] += [(arrival, index) for index in self._small[layer]]
            for index in self._own[layer]:
                rows[index] = take(padded(rows[index]))[: rows[index].numel()]
            for part, piece in self._cut([rows[index] for index in self._own[layer]]):
                self._receive((number, part), Message(sender, piece), [arrival])
            self.writes[self._layers[layer]] += [(slot, rows) for slot in self._targets[send]]
        for (number, sender), entries in packs.items():
            small = [arrival.rows[index] for arrival, index in entries]
            for message, shared, spaces in _pack(take, small):
                for (arrival, index), space in zip(entries[shared], spaces, strict=True):
                    arrival.rows[index] = space
                whole = dict.fromkeys(arrival for arrival, _ in entries[shared])
                self._receive((number, 0), Message(sender, message), whole)
        for arrival, (key, count) in self._last.items():
            self._parts[key].whole.append((count, arrival))

    def _receive(self, key: tuple[int, int], message: Message, arrivals: Iterable[Arrival]) -> None:
        receives = self._parts[key].receives
        receives.append(message)
        for arrival in arrivals:
            self._last[arrival] = max(self._last.get(arrival, (key, 0)), (key, len(receives)))

    def _cut(self, rows: Sequence[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
        """Messages of one expert, and the part of its round that each belongs to: both ends cut it alike."""
        for part, tensor, first, last in cut([row.numel() for row in rows], self._piece):
            row = rows[tensor]
            yield part, row if last - first == row.numel() else row[first:last]


def _pack(
    take: Callable[[int], torch.Tensor], rows: Sequence[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, slice, list[torch.Tensor]]]:
    """Messages that small rows share, of about equal size; which rows; and the place of each of them.

    Both ends cut them alike, since they depend on the sizes of rows alone.
    """
    if not rows:
        return
    sizes = [padded(row) for row in rows]
    ends = list(accumulate(sizes, initial=0))
    messages = max(1, round(ends[-1] / _SHARED))
    cuts = {bisect_left(ends, ends[-1] * number // messages) for number in range(messages + 1)}
    for first, last in pairwise(sorted(cuts)):
        message = take(ends[last] - ends[first])
        spaces = message.split_with_sizes(sizes[first:last])
        yield (
            message,
            slice(first, last),
            [
                space if size == row.numel() else space[: row.numel()]
                for space, size, row in zip(spaces, sizes[first:last], rows[first:last], strict=True)
            ],
        )


def _entries(chosen: npt.NDArray[np.bool_], *fields: npt.ArrayLike) -> Sequence[tuple[int, ...]]:
    """The chosen entries of several fields, [entries] each: one tuple per entry."""
    return list(zip(*(np.asarray(field)[chosen].tolist() for field in fields), strict=True))
