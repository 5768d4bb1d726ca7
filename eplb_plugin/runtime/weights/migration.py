"""The migration plan: copies within ranks and sends between them, a pure function of two placements."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from ...core.errors import PlacementError
from ...core.placement import Placement, checked_ids, slots_by_expert
from ...core.topology import Topology

__all__ = ["Arrivals", "Copies", "MigrationPlan", "Reloads", "Sends", "plan_migration"]

_Ints = npt.NDArray[np.int64]


class Copies(NamedTuple):
    """Copies from slot to slot of one rank; each field int64 [copies] on the CPU, in order of layer.

    Slots are numbered over all ranks; `source_slot` holds the expert before the migration.
    `staged`, bool: the source slot itself gets another expert, so it is read before anything is written.
    """

    layer: torch.Tensor
    rank: torch.Tensor
    source_slot: torch.Tensor
    slot: torch.Tensor
    staged: torch.Tensor


class Sends(NamedTuple):
    """Transfers of an expert from rank to rank; each field int64 [sends] on the CPU, in order of layer.

    `source_rank` held the expert before, in `source_slot` (numbered over all ranks). `rank` did not.
    """

    layer: torch.Tensor
    expert: torch.Tensor
    source_rank: torch.Tensor
    source_slot: torch.Tensor
    rank: torch.Tensor


class Arrivals(NamedTuple):
    """Slots of received experts; an expert that fills several slots of a rank is sent to it once.

    Attributes:
        send: int64 [arrivals], index into the sends, rising.
        slot: int64 [arrivals], slot (numbered over all ranks) that gets the expert.
    """

    send: torch.Tensor
    slot: torch.Tensor


class Reloads(NamedTuple):
    """Slots whose expert no living rank holds: it has to come from the checkpoint. Each field int64 [reloads]
    on the CPU, in order of layer and slot; slots are numbered over all ranks."""

    layer: torch.Tensor
    expert: torch.Tensor
    slot: torch.Tensor


_Table = TypeVar("_Table", Copies, Sends, Arrivals, Reloads)


@dataclass(frozen=True, eq=False)
class MigrationPlan:
    """Every slot that gets another expert appears once, in `copies`, `arrivals` or `reloads`; others stay
    untouched, also those that become empty.

    Attributes:
        layers: int64 [changed layers], rising: the layers with any change.
        copies: within a rank.
        sends: from rank to rank; together with the distinct (layer, rank, expert) of `reloads` these are the
            moves between the two placements.
        arrivals: the slots that the sends fill.
        reloads: the slots that no rank can fill; none unless ranks failed.
    """

    layers: torch.Tensor
    copies: Copies
    sends: Sends
    arrivals: Arrivals
    reloads: Reloads

    @property
    def num_sends(self) -> int:
        return self.sends.layer.numel()

    def of_layers(self, first: int, end: int) -> MigrationPlan:
        """The part of the plan for layers `first` to `end - 1`, which become 0 to `end - first - 1`."""

        def part(table: _Table, first: int = first, end: int = end) -> _Table:
            """The rows whose first column is `first` to `end - 1`, counted from `first`."""
            rows = slice(*torch.searchsorted(table[0], torch.tensor([first, end])).tolist())
            return type(table)(table[0][rows] - first, *(column[rows] for column in table[1:]))

        sent = torch.searchsorted(self.sends.layer, torch.tensor([first, end])).tolist()
        return MigrationPlan(
            layers=self.layers[(self.layers >= first) & (self.layers < end)] - first,
            copies=part(self.copies),
            sends=part(self.sends),
            arrivals=part(self.arrivals, *sent),
            reloads=part(self.reloads),
        )


def plan_migration(
    old: Placement | torch.Tensor,
    new: Placement,
    topology: Topology,
    *,
    active_ranks: Sequence[bool] | torch.Tensor | None = None,
) -> MigrationPlan:
    """Plan the migration from `old` to `new`.

    The sender of an expert is on the receiver's node if possible; among several, the rank that sends least in
    that layer. The same arguments give the same plan on every rank.

    Args:
        old: the placement in force, or its int64 [layers, slots]; the tensor may have empty slots (-1) and
            lack experts, as `current` of `plan` may.
        new: the placement to migrate to.
        topology: nodes, ranks and slots.
        active_ranks: bool [ranks], the living ranks; None is all. Dead ranks send nothing.

    Returns:
        The plan, its tensors on the CPU.

    Raises:
        PlacementError: the placements differ in shape or experts, or their slots from the topology's; a slot
            of a dead rank is to be filled. TopologyError: a malformed `active_ranks`.
    """
    if isinstance(old, Placement):
        held, fits = old.physical_to_logical, old.num_logical == new.num_logical
    else:
        held, fits = checked_ids(old, new.num_logical), True
    if not fits or held.shape != new.physical_to_logical.shape or new.num_slots != topology.num_slots:
        described = old if isinstance(old, Placement) else f"a table {tuple(old.shape)}"
        raise PlacementError(f"cannot migrate from {described} to {new} on {topology}")
    rank_of_slot = topology.rank_of_slot().numpy()
    alive = topology.living_ranks(active_ranks)
    before = held.cpu().numpy()
    after = new.physical_to_logical.cpu().numpy()
    if not all(alive):
        dead = ~np.array(alive)[rank_of_slot]
        wrong = np.argwhere((after >= 0) & dead)
        if wrong.size:
            at, slot = wrong[0]
            raise PlacementError(
                f"layer {at} gives expert {after[at, slot]} to slot {slot} of rank {rank_of_slot[slot]}, "
                "which active_ranks says is dead"
            )
        before = np.where(dead, -1, before)
    changed = before != after
    filled = changed & (after >= 0)
    layer, slot = filled.nonzero()  # sorted by layer, then slot
    expert, rank = after[layer, slot], rank_of_slot[slot]
    source = _local_source(before, changed, new.num_logical, topology)[layer, rank, expert]
    holders = slots_by_expert(torch.from_numpy(before), new.num_logical).numpy()

    here = source >= 0
    copies = layer[here], rank[here], source[here], slot[here], filled[layer[here], source[here]]

    lost = holders[layer, expert, 0] < 0
    away = ~here & ~lost
    shape = len(before), topology.num_ranks, new.num_logical
    key = np.ravel_multi_index((layer[away], rank[away], expert[away]), shape)
    unique, send = np.unique(key, return_inverse=True)
    send_layer, send_rank, send_expert = np.unravel_index(unique, shape)
    source_slot = _choose_senders(
        send_layer, send_rank, holders[send_layer, send_expert], len(before), topology
    )
    sends = send_layer, send_expert, rank_of_slot[source_slot], source_slot, send_rank
    by_send = np.argsort(send.reshape(-1), kind="stable")
    return MigrationPlan(
        layers=_tensor(changed.any(1).nonzero()[0]),
        copies=Copies(*map(_tensor, copies)),
        sends=Sends(*map(_tensor, sends)),
        arrivals=Arrivals(_tensor(send.reshape(-1)[by_send]), _tensor(slot[away][by_send])),
        reloads=Reloads(*map(_tensor, (layer[lost], expert[lost], slot[lost]))),
    )


def _local_source(
    before: _Ints, changed: npt.NDArray[np.bool_], num_logical: int, topology: Topology
) -> _Ints:
    """[layers, ranks, logical]: a slot of the rank that holds the expert before, else -1.

    A slot that keeps its expert is preferred, then the lowest: assignments in rising order of preference.
    """
    layers = before.shape[0]
    # One more expert, for empty slots.
    source = np.full((layers, topology.num_ranks, num_logical + 1), -1, dtype=np.int64)
    held = topology.by_rank(torch.from_numpy(before), -1).numpy()
    dirty = topology.by_rank(torch.from_numpy(changed), True).numpy()
    rows, ranks = np.ogrid[:layers, : topology.num_ranks]
    first = np.array(topology.first_slots[:-1])
    for only_kept in (False, True):
        for i in reversed(range(topology.most_slots)):
            at = (rows, ranks, held[:, :, i])
            source[at] = np.where(only_kept & dirty[:, :, i], source[at], first + i)
    return source[:, :, :num_logical]


def _choose_senders(layer: _Ints, rank: _Ints, replicas: _Ints, num_layers: int, topology: Topology) -> _Ints:
    """The source slot of each send: int64 [sends].

    Args:
        layer, rank: [sends], layer and receiving rank, in order of layer.
        replicas: [sends, max_replicas], slots that held the expert before, padded with -1.
    """
    if not layer.size:
        return layer
    rank_of_slot = topology.rank_of_slot().numpy()
    senders = rank_of_slot[replicas]  # of the padding too, which `usable` masks
    usable = replicas >= 0
    near = usable & (senders // topology.ranks_per_node == (rank // topology.ranks_per_node)[:, None])
    usable = np.where(near.any(1, keepdims=True), near, usable)
    choices = usable.sum(1)
    chosen: _Ints = replicas[np.arange(layer.size), usable.argmax(1)]

    # Sends with a single replica count first. The others take the least busy sender, fewest choices first.
    # Layers are independent, so each turn decides one send of every layer.
    busy = np.zeros((num_layers, topology.num_ranks), dtype=np.int64)
    forced = choices == 1
    np.add.at(busy, (layer[forced], rank_of_slot[chosen[forced]]), 1)
    open_sends = np.flatnonzero(~forced)
    open_sends = open_sends[np.lexsort((choices[open_sends], layer[open_sends]))]
    open_layer = layer[open_sends]
    turn = np.arange(open_sends.size) - np.searchsorted(open_layer, open_layer)
    by_turn = np.argsort(turn, kind="stable")
    bounds = np.flatnonzero(np.diff(turn[by_turn], prepend=-1, append=-1))
    for start, end in itertools.pairwise(bounds):
        now = open_sends[by_turn[start:end]]
        sender = senders[now]
        # Ties go to another rank in each layer, so that low ranks do not send most over all layers.
        tie = (sender - layer[now, None]) % topology.num_ranks
        cost = busy[layer[now, None], sender] * topology.num_ranks + tie
        best = np.where(usable[now], cost, np.iinfo(np.int64).max).argmin(1)
        chosen[now] = replicas[now, best]
        busy[layer[now], rank_of_slot[chosen[now]]] += 1
    return chosen


def _tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
