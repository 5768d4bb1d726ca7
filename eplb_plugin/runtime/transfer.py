"""One hop on one rank: staged first, and committed layer by layer when every rank has all that it needs."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..topology import Topology
from .hops import Hop
from .messages import InFlight, Message, Transport
from .rounds import cut, plan_rounds
from .staging import Arrival
from .weights import ExpertWeights, is_packed, padded

__all__ = ["Transfer"]


@dataclass
class _Round:
    """What this rank sends and receives at once."""

    sends: list[Message] = field(default_factory=list)
    receives: list[Message] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Of the busier direction."""
        return max(
            sum(message.tensor.numel() for message in messages) for messages in (self.sends, self.receives)
        )


class Transfer:
    """What a rank sends, receives and writes in one hop.

    Both ends of a pair list its sends in the order of the plan, so messages match without tags.

    Args:
        hop: the same on every rank.
        weights: what this rank holds.
        topology: gives the slots of a rank.
        rank: this rank.
        piece: bytes that are sent at once; None is everything.

    Attributes:
        num_bytes: staging memory that this rank needs.
        sends: for each expert that is sent from rank to rank, over all ranks: its layer.
        arrivals: what is about to be used, once `finish` has ended.
    """

    def __init__(
        self, hop: Hop, weights: ExpertWeights, topology: Topology, rank: int, piece: int | None = None
    ) -> None:
        plan = hop.migration
        self._layers = hop.layers
        self._rows = [weights.rows[layer] for layer in hop.layers]
        self._first = topology.slots_of_rank(rank).start
        self._after = hop.after
        self._piece = piece
        sends, copies = plan.sends, plan.copies
        self.sends = [hop.layers[layer] for layer in sends.layer.tolist()]
        expert_bytes = [weights.expert_bytes(layer) for layer in hop.layers]
        rounds = torch.tensor(plan_rounds(sends, expert_bytes, topology.num_ranks, piece), dtype=torch.int64)

        sending = sends.source_rank == rank
        self._outgoing = _lists(sending, sends.rank, sends.layer, sends.source_slot, rounds)
        receiving = sends.rank == rank
        numbers = torch.arange(plan.num_sends)
        self._incoming = _lists(
            receiving, sends.source_rank, sends.layer, sends.expert, sends.source_slot, rounds, numbers
        )
        # One entry per slot that a send fills.
        self._targets: dict[int, list[int]] = defaultdict(list)
        for send, slot in _lists(receiving[plan.arrivals.send], plan.arrivals.send, plan.arrivals.slot):
            self._targets[send].append(slot)
        self._copies = _lists(
            copies.rank == rank, copies.layer, copies.source_slot, copies.slot, copies.staged
        )

        self.num_bytes = (
            sum(weights.staged_bytes(self._layers[incoming[1]]) for incoming in self._incoming)
            + sum(weights.staged_bytes(self._layers[layer]) for layer, _, _, staged in self._copies if staged)
            + sum(weights.packed_bytes(self._layers[outgoing[1]]) for outgoing in self._outgoing)
        )
        self.arrivals: list[Arrival] = []
        self._writes: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        # What to copy to where, in pieces of work.
        self._fills: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        # Of each tensor of a layer, its slots.
        self._slots: dict[int, list[tuple[torch.Tensor, ...]]] = {}
        # By round and part of it.
        self._rounds: dict[tuple[int, int], _Round] = defaultdict(_Round)
        self._waiting: list[_Round] = []
        self._in_flight = InFlight()
        self._started = 0.0

    def lay_out(self, buffer: torch.Tensor) -> None:
        """Say where in the buffer everything goes. Reads and writes no weights, and waits for nobody.

        Args:
            buffer: uint8 [num_bytes].
        """
        used = 0

        def take(num_bytes: int) -> torch.Tensor:
            nonlocal used
            used += num_bytes
            return buffer[used - num_bytes : used]

        self._lay_out_sends(take)
        self._lay_out_receives(take)
        # Slots that nothing writes to are read when they are committed, without a detour.
        for layer, source_slot, slot, staged in self._copies:
            rows = self._slot(layer, source_slot)
            if staged:
                spaces = [take(padded(row))[: row.numel()] for row in rows]
                self._fills.append(list(zip(spaces, rows, strict=True)))
                rows = spaces
            expert = int(self._after[layer, slot])
            self.arrivals.append(Arrival(self._layers[layer], expert, source_slot, rows))
            self._write(layer, slot, rows)
        self._waiting = [self._rounds[key] for key in sorted(self._rounds)]

    def fill(self, rest: Callable[[], None] = lambda: None) -> None:
        """Fill what this rank can fill alone: small rows that share a message, and copies within the rank.

        Args:
            rest: called between pieces of work.
        """
        for fills in self._fills:
            for space, row in fills:
                space.copy_(row)
            rest()

    def start(self, transport: Transport) -> None:
        """Have the first messages on their way, without waiting for any."""
        self._send(transport)

    def finish(
        self,
        transport: Transport,
        settle: Callable[[], None] = lambda: None,
        after: Callable[[int, float], None] = lambda *_: None,
    ) -> None:
        """Wait until all has been sent and received, round by round.

        Args:
            transport: as for `start`.
            settle: waits for the device.
            after: called after each round, with the bytes of its busier direction and the seconds it took.

        Raises:
            RankLostError: a peer does not answer; the buffer is lost then, since what is late may still be
                written to it.
        """
        while self._waiting:
            self._in_flight.wait()
            settle()
            after(self._waiting.pop(0).num_bytes, time.perf_counter() - self._started)
            self._send(transport)

    def commit(self, layer: int) -> None:
        """Write what was staged for a layer to its slots."""
        for target, staged in self._writes[self._layers.index(layer)]:
            target.copy_(staged)

    def _send(self, transport: Transport) -> None:
        """Start the next round."""
        self._started = time.perf_counter()
        if self._waiting:
            self._in_flight = transport.start(self._waiting[0].sends, self._waiting[0].receives)

    def _lay_out_sends(self, take: Callable[[int], torch.Tensor]) -> None:
        packs: dict[tuple[int, int], list[torch.Tensor]] = defaultdict(list)
        for receiver, layer, source_slot, number in self._outgoing:
            rows = self._slot(layer, source_slot)
            packs[number, receiver] += [row for row in rows if is_packed(row)]
            self._cut(number, receiver, [row for row in rows if not is_packed(row)], sending=True)
        for (number, receiver), rows in packs.items():
            if rows:
                message, spaces = _spaces(take, rows)
                self._rounds[number, 0].sends.append(Message(receiver, message))
                self._fills.append(list(zip(spaces, rows, strict=True)))

    def _lay_out_receives(self, take: Callable[[int], torch.Tensor]) -> None:
        packs: dict[tuple[int, int], list[tuple[Arrival, int, torch.Tensor]]] = defaultdict(list)
        for sender, layer, expert, source_slot, number, _ in self._incoming:
            # Any slot will do: what counts is how large its rows are.
            rows = self._slot(layer, self._first)
            arrival = Arrival(self._layers[layer], expert, source_slot, rows)
            own = []
            for index, row in enumerate(rows):
                if is_packed(row):
                    packs[number, sender].append((arrival, index, row))
                else:
                    rows[index] = take(padded(row))[: row.numel()]
                    own.append(rows[index])
            self._cut(number, sender, own, sending=False)
            self.arrivals.append(arrival)
        for (number, sender), entries in packs.items():
            message, spaces = _spaces(take, [row for _, _, row in entries])
            self._rounds[number, 0].receives.append(Message(sender, message))
            for (arrival, index, _), space in zip(entries, spaces, strict=True):
                arrival.rows[index] = space
        for arrival, (_, layer, *_, send) in zip(self.arrivals, self._incoming, strict=True):
            for slot in self._targets[send]:
                self._write(layer, slot, arrival.rows)

    def _cut(self, number: int, rank: int, rows: list[torch.Tensor], *, sending: bool) -> None:
        """Messages of one expert in a round: both ends cut it alike."""
        for part, tensor, first, last in cut([row.numel() for row in rows], self._piece):
            of_part, row = self._rounds[number, part], rows[tensor]
            piece = row if last - first == row.numel() else row[first:last]
            (of_part.sends if sending else of_part.receives).append(Message(rank, piece))

    def _write(self, layer: int, slot: int, staged: list[torch.Tensor]) -> None:
        self._writes[layer] += zip(self._slot(layer, slot), staged, strict=True)

    def _slot(self, layer: int, slot: int) -> list[torch.Tensor]:
        """What the rank's slot holds: uint8 [bytes] of each tensor."""
        if layer not in self._slots:
            self._slots[layer] = [row.unbind() for row in self._rows[layer]]
        return [slots[slot - self._first] for slots in self._slots[layer]]


def _spaces(
    take: Callable[[int], torch.Tensor], rows: list[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One message for `rows`, and the part of it that is for each of them."""
    sizes = [padded(row) for row in rows]
    message = take(sum(sizes))
    spaces = torch.split(message, sizes)
    return message, [
        space if space.numel() == row.numel() else space[: row.numel()]
        for space, row in zip(spaces, rows, strict=True)
    ]


def _lists(chosen: torch.Tensor, *fields: torch.Tensor) -> list[list[int]]:
    """The chosen entries of several fields, one list per entry."""
    return torch.stack([field.to(torch.int64) for field in fields], 1)[chosen].tolist()
