"""Moving expert weights between ranks: staged first, then committed when every rank has all it needs."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from ..errors import TransferError
from ..migration import MigrationPlan
from ..topology import Topology
from .collectives import RankGroup
from .weights import ExpertWeights

__all__ = ["Staging", "TransferTimes", "execute", "layer_chunks"]

# Rows of at least this many bytes are sent from where they are; smaller ones (scales, biases, small
# experts) share one message per pair of ranks, since a message costs more than copying them.
_OWN_MESSAGE = 64 * 1024
_ALIGN = 16


@dataclass(frozen=True)
class TransferTimes:
    """Seconds that this rank spent on filling the staging buffers and on committing them."""

    transfer: float
    commit: float


class Staging:
    """The memory that incoming weights wait in: all that a transfer allocates, kept for the next one, since
    fresh memory costs about as much time as what is received into it.

    Args:
        bound: bytes; a single layer may exceed it.
    """

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def reserve(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        """uint8 [num_bytes or more], whatever it held before."""
        if self._buffer.numel() < num_bytes or self._buffer.device != device:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # two at once might not fit
            with torch.inference_mode(False):
                self._buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return self._buffer


def execute(
    plan: MigrationPlan,
    weights: ExpertWeights,
    topology: Topology,
    group: RankGroup,
    *,
    staging: Staging,
    committed: Callable[[list[int]], None],
) -> TransferTimes:
    """Carry out a migration plan. All ranks call it with the same plan and bound.

    Args:
        plan: the plan, the same on every rank.
        weights: what this rank holds.
        topology: gives the slots of a rank.
        group: one process per rank.
        staging: where incoming weights wait; of the same bound on every rank.
        committed: called with the layers of each chunk once their weights are in place.

    Raises:
        TransferError: on all ranks, when any of them failed before a commit. The layers already
            reported to `committed` have the new placement, all others the old one, on every rank.
    """
    chunks = layer_chunks(plan, weights, topology, staging.bound)
    stages = [_Stage(plan, weights, topology, group.rank, layers) for layers in chunks]
    largest = max((stage.num_bytes for stage in stages), default=0)
    seconds_transfer = seconds_commit = 0.0
    buffer: torch.Tensor | None = None
    for stage in stages:
        # Phase 1, all ranks: memory, once. Nothing was sent yet.
        start = time.perf_counter()
        if buffer is None:
            device = weights.device if weights.device is not None else group.device
            buffer = group.attempt(
                "allocating staging memory",
                partial(staging.reserve, largest, device),
                TransferError,
            )
        # Phase 2, all ranks: fill the staging buffers. Nothing in force changes.
        group.attempt("moving expert weights", partial(stage.fill, buffer, group), TransferError)
        seconds_transfer += time.perf_counter() - start
        # Phase 3, each rank alone: all are ready, and nothing below can fail.
        start = time.perf_counter()
        stage.commit()
        committed(stage.layers)
        seconds_commit += time.perf_counter() - start
    return TransferTimes(seconds_transfer, seconds_commit)


def layer_chunks(
    plan: MigrationPlan, weights: ExpertWeights, topology: Topology, staging_bytes: int
) -> list[list[int]]:
    """Cut the changed layers into runs that fit into `staging_bytes` on every rank, at least one layer each.

    Every rank computes the same chunks, since they follow from the plan and the weights' structure alone.
    """
    ranks = topology.num_ranks
    received, staged, sent = (
        torch.zeros(weights.num_layers * ranks, dtype=torch.int64).index_add_(0, key, torch.ones_like(key))
        for key in (
            plan.sends.layer * ranks + plan.sends.rank,
            (plan.copies.layer * ranks + plan.copies.rank)[plan.copies.staged],
            plan.sends.layer * ranks + plan.sends.source_rank,
        )
    )
    row = torch.tensor([sum(_padded(r) for r in rows) for rows in weights.rows])
    packed = torch.tensor([sum(_padded(r) for r in rows if _is_packed(r)) for rows in weights.rows])
    need = (received + staged).view(-1, ranks) * row[:, None] + sent.view(-1, ranks) * packed[:, None]

    chunks: list[list[int]] = []
    filled = torch.zeros(ranks, dtype=torch.int64)
    for layer in plan.layers.tolist():
        filled = filled + need[layer]
        if not chunks or int(filled.max()) > staging_bytes:
            chunks.append([])
            filled = need[layer]
        chunks[-1].append(layer)
    return chunks


def _padded(row: torch.Tensor) -> int:
    return -(-row.shape[1] // _ALIGN) * _ALIGN


def _is_packed(row: torch.Tensor) -> bool:
    return row.shape[1] < _OWN_MESSAGE


class _Stage:
    """One chunk of layers as this rank sees it: what to send, what to receive, and where that goes.

    Both ends of a pair list its sends in the order of the plan, so messages match without tags.
    """

    def __init__(
        self, plan: MigrationPlan, weights: ExpertWeights, topology: Topology, rank: int, layers: list[int]
    ) -> None:
        self.layers = layers
        self._rows = weights.rows
        first = topology.slots_of_rank(rank).start
        wanted = torch.zeros(weights.num_layers, dtype=torch.bool)
        wanted[layers] = True
        sends, copies = plan.sends, plan.copies

        sending = wanted[sends.layer] & (sends.source_rank == rank)
        self._outgoing = _triples(sends.rank, sends.layer, sends.source_slot - first, sending)
        receiving = wanted[sends.layer] & (sends.rank == rank)
        # One entry per slot that a send fills; entries of one send follow each other.
        arrives = receiving[plan.arrivals.send]
        self._targets: dict[int, list[int]] = defaultdict(list)
        for send, slot in zip(
            plan.arrivals.send[arrives].tolist(), (plan.arrivals.slot[arrives] - first).tolist(), strict=True
        ):
            self._targets[send].append(slot)
        self._incoming = _triples(sends.source_rank, sends.layer, torch.arange(plan.num_sends), receiving)
        mine = wanted[copies.layer] & (copies.rank == rank)
        local = (copies.layer, copies.source_slot - first, copies.slot - first)
        self._staged_copies = _triples(*local, mine & copies.staged)
        self._direct_copies = _triples(*local, mine & ~copies.staged)

        received = sum(_padded(row) for _, layer, _ in self._incoming for row in self._rows[layer])
        staged = sum(_padded(row) for layer, _, _ in self._staged_copies for row in self._rows[layer])
        packed = sum(
            _padded(row) for _, layer, _ in self._outgoing for row in self._rows[layer] if _is_packed(row)
        )
        self.num_bytes = received + staged + packed
        """Staging memory that this rank needs."""
        self._writes: list[tuple[torch.Tensor, torch.Tensor]] = []

    def fill(self, buffer: torch.Tensor, group: RankGroup) -> None:
        """Send, receive and wait; afterwards the buffer holds all that `commit` writes."""
        self._writes.clear()
        used = 0

        def take(num_bytes: int) -> torch.Tensor:
            nonlocal used
            used += num_bytes
            return buffer[used - num_bytes : used]

        operations: list[dist.P2POp] = []

        def post(kind: Callable[..., object], tensor: torch.Tensor, rank: int) -> None:
            operations.append(dist.P2POp(kind, tensor, group.peer(rank), group.group))

        packs: dict[int, list[torch.Tensor]] = defaultdict(list)
        for receiver, layer, slot in self._outgoing:
            for row in self._rows[layer]:
                if _is_packed(row):
                    packs[receiver].append(row[slot])
                else:
                    post(dist.isend, row[slot], receiver)
        for receiver, parts in packs.items():
            padded = [-(-part.numel() // _ALIGN) * _ALIGN for part in parts]
            message = take(sum(padded))
            for part, space in zip(parts, torch.split(message, padded), strict=True):
                space[: part.numel()].copy_(part)
            post(dist.isend, message, receiver)

        expected: dict[int, list[tuple[torch.Tensor, list[int]]]] = defaultdict(list)
        for sender, layer, send in self._incoming:
            for row in self._rows[layer]:
                if _is_packed(row):
                    expected[sender].append((row, self._targets[send]))
                else:
                    space = take(_padded(row))[: row.shape[1]]
                    post(dist.irecv, space, sender)
                    self._writes += [(row[slot], space) for slot in self._targets[send]]
        for sender, entries in expected.items():
            padded = [_padded(row) for row, _ in entries]
            message = take(sum(padded))
            post(dist.irecv, message, sender)
            for (row, slots), space in zip(entries, torch.split(message, padded), strict=True):
                self._writes += [(row[slot], space[: row.shape[1]]) for slot in slots]

        works = dist.batch_isend_irecv(operations) if operations else []
        for layer, source, slot in self._staged_copies:
            for row in self._rows[layer]:
                space = take(_padded(row))[: row.shape[1]].copy_(row[source])
                self._writes.append((row[slot], space))
        for work in works:
            work.wait()

    def commit(self) -> None:
        """Write what was staged to its slots. Direct copies read slots that nothing writes to."""
        for target, staged in self._writes:
            target.copy_(staged)
        for layer, source, slot in self._direct_copies:
            for row in self._rows[layer]:
                row[slot].copy_(row[source])
        self._writes.clear()


def _triples(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, chosen: torch.Tensor
) -> list[tuple[int, int, int]]:
    return list(zip(a[chosen].tolist(), b[chosen].tolist(), c[chosen].tolist(), strict=True))
