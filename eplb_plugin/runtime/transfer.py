"""One hop on one rank: staged first, and committed layer by layer when every rank has all that it needs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch

from ..topology import Topology
from .collectives import Message, RankGroup
from .hops import Hop
from .weights import ExpertWeights, is_packed, padded

__all__ = ["Arrival", "Staging", "Transfer"]


class Staging:
    """The memory that incoming weights wait in: all that a transfer allocates, kept for the next one, since
    fresh memory costs about as much time as what is received into it.

    Args:
        bound: bytes that are never exceeded.
    """

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def reserve(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        """uint8 [num_bytes or more], whatever it held before.

        Raises:
            MemoryError: more than the bound.
        """
        if num_bytes > self.bound:
            raise MemoryError(f"{num_bytes} bytes of staging memory exceed the bound of {self.bound}")
        if self._buffer.numel() < num_bytes or self._buffer.device != device:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # two at once might not fit
            with torch.inference_mode(False):
                self._buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return self._buffer


@dataclass(frozen=True, eq=False)
class Arrival:
    """One expert that a rank is about to use in a slot that held another.

    Attributes:
        layer: its layer.
        expert: the logical expert.
        source_slot: the slot (numbered over all ranks) that it comes from.
        rows: uint8 [bytes] of each tensor, in order; where they wait.
    """

    layer: int
    expert: int
    source_slot: int
    rows: list[torch.Tensor]


class Transfer:
    """What a rank sends, receives and writes in one hop.

    Both ends of a pair list its sends in the order of the plan, so messages match without tags.

    Args:
        hop: the same on every rank.
        weights: what this rank holds.
        topology: gives the slots of a rank.
        rank: this rank.

    Attributes:
        num_bytes: staging memory that this rank needs.
        sends: for each expert that is sent from rank to rank, over all ranks: its layer.
        arrivals: what is about to be used, once `exchange` has ended.
    """

    def __init__(self, hop: Hop, weights: ExpertWeights, topology: Topology, rank: int) -> None:
        plan = hop.migration(topology)
        self._layers = hop.layers
        self._rows = [weights.rows[layer] for layer in hop.layers]
        self._first = topology.slots_of_rank(rank).start
        self._after = hop.after
        sends, copies = plan.sends, plan.copies
        self.sends = [hop.layers[layer] for layer in sends.layer.tolist()]

        sending = sends.source_rank == rank
        self._outgoing = _lists(sending, sends.rank, sends.layer, sends.source_slot)
        receiving = sends.rank == rank
        self._incoming = _lists(
            receiving,
            sends.source_rank,
            sends.layer,
            sends.expert,
            sends.source_slot,
            torch.arange(plan.num_sends),
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
        self._sends: list[Message] = []
        self._receives: list[Message] = []

    def prepare(self, buffer: torch.Tensor) -> None:
        """Lay out the buffer and fill what this rank can fill alone. No other rank is waited for."""
        used = 0

        def take(num_bytes: int) -> torch.Tensor:
            nonlocal used
            used += num_bytes
            return buffer[used - num_bytes : used]

        packs: dict[int, list[torch.Tensor]] = defaultdict(list)
        for receiver, layer, source_slot in self._outgoing:
            for row in self._rows[layer]:
                source = row[source_slot - self._first]
                if is_packed(row):
                    packs[receiver].append(source)
                else:
                    self._sends.append(Message(receiver, source))
        for receiver, parts in packs.items():
            message = take(sum(padded(part) for part in parts))
            for part, space in zip(
                parts, torch.split(message, [padded(part) for part in parts]), strict=True
            ):
                space[: part.numel()].copy_(part)
            self._sends.append(Message(receiver, message))

        packed_rows: dict[int, list[tuple[Arrival, int, torch.Tensor]]] = defaultdict(list)
        for sender, layer, expert, source_slot, _ in self._incoming:
            rows = self._rows[layer]
            arrival = Arrival(self._layers[layer], expert, source_slot, [row[0] for row in rows])
            self.arrivals.append(arrival)
            for index, row in enumerate(rows):
                if is_packed(row):
                    packed_rows[sender].append((arrival, index, row))
                else:
                    arrival.rows[index] = take(padded(row))[: row.shape[1]]
                    self._receives.append(Message(sender, arrival.rows[index]))
        for sender, entries in packed_rows.items():
            message = take(sum(padded(row) for _, _, row in entries))
            self._receives.append(Message(sender, message))
            sizes = [padded(row) for _, _, row in entries]
            for (arrival, index, row), space in zip(entries, torch.split(message, sizes), strict=True):
                arrival.rows[index] = space[: row.shape[1]]
        for arrival, (_, layer, _, _, send) in zip(self.arrivals, self._incoming, strict=True):
            for slot in self._targets[send]:
                self._write(layer, slot, arrival.rows)

        # Slots that nothing writes to are read when they are committed, without a detour.
        for layer, source_slot, slot, staged in self._copies:
            rows = [row[source_slot - self._first] for row in self._rows[layer]]
            if staged:
                rows = [take(padded(row))[: row.numel()].copy_(row) for row in rows]
            expert = int(self._after[layer, slot])
            self.arrivals.append(Arrival(self._layers[layer], expert, source_slot, rows))
            self._write(layer, slot, rows)

    def exchange(self, group: RankGroup) -> None:
        """Send, receive and wait. RankLostError where a peer does not answer; the buffer is lost then, since
        what is late may still be written to it."""
        group.move(self._sends, self._receives)

    def commit(self, layer: int) -> None:
        """Write what was staged for a layer to its slots."""
        for target, staged in self._writes[self._layers.index(layer)]:
            target.copy_(staged)

    def _write(self, layer: int, slot: int, staged: list[torch.Tensor]) -> None:
        self._writes[layer] += [
            (row[slot - self._first], source) for row, source in zip(self._rows[layer], staged, strict=True)
        ]


def _lists(chosen: torch.Tensor, *fields: torch.Tensor) -> list[list[int]]:
    """The chosen entries of several fields, one list per entry."""
    return torch.stack([field[chosen].to(torch.int64) for field in fields], 1).tolist()
