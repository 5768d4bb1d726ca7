"""What has to be copied and sent to get from one placement to another: a pure function of the two."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from .errors import PlacementError
from .placement import Placement
from .topology import Topology

__all__ = ["Arrivals", "Copies", "MigrationPlan", "Sends", "plan_migration"]

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Copies:
    """Copies from slot to slot of one rank; each field int64 [copies] on the CPU, in order of layer.

    Attributes:
        layer: layer of the copy.
        rank: the rank that copies.
        source_slot: slot (numbered over all ranks) that holds the expert before the migration.
        slot: slot that gets it.
        staged: bool; the source slot itself gets another expert, so read it before anything is written.
    """

    layer: torch.Tensor
    rank: torch.Tensor
    source_slot: torch.Tensor
    slot: torch.Tensor
    staged: torch.Tensor


@dataclass(frozen=True, eq=False)
class Sends:
    """Transfers of one expert from rank to rank; each field int64 [sends] on the CPU, in order of layer.

    Attributes:
        layer: layer of the expert.
        expert: the logical expert.
        source_rank: the sending rank, which held the expert before.
        source_slot: slot (numbered over all ranks) that it sends from.
        rank: the receiving rank, which did not hold the expert before.
    """

    layer: torch.Tensor
    expert: torch.Tensor
    source_rank: torch.Tensor
    source_slot: torch.Tensor
    rank: torch.Tensor


@dataclass(frozen=True, eq=False)
class Arrivals:
    """Where received experts go; an expert that fills several slots of a rank is sent to it once.

    Attributes:
        send: int64 [arrivals], index into the sends, rising.
        slot: int64 [arrivals], slot (numbered over all ranks) that gets it.
    """

    send: torch.Tensor
    slot: torch.Tensor


@dataclass(frozen=True, eq=False)
class MigrationPlan:
    """Every slot whose expert changes appears once, in `copies` or in `arrivals`; others stay untouched.

    Attributes:
        layers: int64 [changed layers], rising: the layers with any change.
        copies: what a rank copies from itself.
        sends: what ranks send to each other; as many as the moves between the two placements.
        arrivals: the slots that the sends fill.
    """

    layers: torch.Tensor
    copies: Copies
    sends: Sends
    arrivals: Arrivals

    @property
    def num_sends(self) -> int:
        return self.sends.layer.numel()


def plan_migration(old: Placement, new: Placement, topology: Topology) -> MigrationPlan:
    """Plan how the weights get from `old` to `new`.

    A sender on the receiver's node is preferred; among those, the rank that sends least in that layer.
    The same arguments give the same plan on every rank.

    Returns:
        The plan, its tensors on the CPU.

    Raises:
        PlacementError: the placements differ in shape or experts, or their slots from the topology's.
    """
    if (
        old.num_logical != new.num_logical
        or old.physical_to_logical.shape != new.physical_to_logical.shape
        or new.num_slots != topology.num_slots
    ):
        raise PlacementError(f"cannot migrate from {old} to {new} on {topology}")
    before = old.physical_to_logical.cpu().numpy()
    after = new.physical_to_logical.cpu().numpy()
    changed = before != after
    layer, slot = changed.nonzero()  # sorted by layer, then slot
    expert, rank = after[layer, slot], slot // topology.slots_per_rank
    source = _local_source(before, changed, old.num_logical, topology)[layer, rank, expert]

    here = source >= 0
    copies = Copies(
        layer=_tensor(layer[here]),
        rank=_tensor(rank[here]),
        source_slot=_tensor(source[here]),
        slot=_tensor(slot[here]),
        staged=torch.from_numpy(changed[layer[here], source[here]]),
    )

    away = ~here
    key = (layer[away] * topology.num_ranks + rank[away]) * old.num_logical + expert[away]
    unique, send = np.unique(key, return_inverse=True)
    send_expert = unique % old.num_logical
    send_rank = unique // old.num_logical % topology.num_ranks
    send_layer = unique // (old.num_logical * topology.num_ranks)
    replicas = old.logical_to_physical.cpu().numpy()[send_layer, send_expert]
    source_slot = _choose_senders(send_layer, send_rank, replicas, old.num_layers, topology)
    by_send = np.argsort(send.reshape(-1), kind="stable")
    return MigrationPlan(
        layers=_tensor(changed.any(1).nonzero()[0]),
        copies=copies,
        sends=Sends(
            layer=_tensor(send_layer),
            expert=_tensor(send_expert),
            source_rank=_tensor(source_slot // topology.slots_per_rank),
            source_slot=_tensor(source_slot),
            rank=_tensor(send_rank),
        ),
        arrivals=Arrivals(send=_tensor(send.reshape(-1)[by_send]), slot=_tensor(slot[away][by_send])),
    )


def _local_source(
    before: _Ints, changed: npt.NDArray[np.bool_], num_logical: int, topology: Topology
) -> _Ints:
    """[layers, ranks, logical]: a slot of the rank that holds the expert before, else -1.

    A slot that keeps its expert is preferred, then the lowest: assignments in rising order of preference.
    """
    layers = before.shape[0]
    source = np.full((layers, topology.num_ranks, num_logical), -1, dtype=np.int64)
    per_rank = (layers, topology.num_ranks, topology.slots_per_rank)
    held, dirty = before.reshape(per_rank), changed.reshape(per_rank)
    rows, ranks = np.ogrid[:layers, : topology.num_ranks]
    first = ranks * topology.slots_per_rank
    for only_kept in (False, True):
        for i in reversed(range(topology.slots_per_rank)):
            at = (rows, ranks, held[:, :, i])
            if only_kept:
                source[at] = np.where(dirty[:, :, i], source[at], first + i)
            else:
                source[at] = first + i
    return source


def _choose_senders(layer: _Ints, rank: _Ints, replicas: _Ints, num_layers: int, topology: Topology) -> _Ints:
    """The slot that each send starts from.

    Args:
        layer, rank: [sends], layer and receiving rank, in order of layer.
        replicas: [sends, max_replicas], slots that held the expert before, padded with -1.
    """
    if not layer.size:
        return layer
    node = rank // topology.ranks_per_node
    usable = replicas >= 0
    near = usable & (replicas // topology.slots_per_node == node[:, None])
    usable = np.where(near.any(1, keepdims=True), near, usable)
    choices = usable.sum(1)
    chosen: _Ints = replicas[np.arange(layer.size), usable.argmax(1)]

    # Sends without a choice count first; the others then take the least busy sender, those with few
    # choices first. Layers do not depend on each other, so each turn decides one send of every layer.
    busy = np.zeros((num_layers, topology.num_ranks), dtype=np.int64)
    forced = choices == 1
    np.add.at(busy, (layer[forced], chosen[forced] // topology.slots_per_rank), 1)
    open_sends = np.flatnonzero(~forced)
    open_sends = open_sends[np.lexsort((choices[open_sends], layer[open_sends]))]
    open_layer = layer[open_sends]
    turn = np.arange(open_sends.size) - np.searchsorted(open_layer, open_layer)
    by_turn = np.argsort(turn, kind="stable")
    bounds = np.flatnonzero(np.diff(turn[by_turn], prepend=-1, append=-1))
    for start, end in itertools.pairwise(bounds):
        now = open_sends[by_turn[start:end]]
        sender = replicas[now] // topology.slots_per_rank
        # Ties go to another rank in each layer, so that low ranks do not send most over all layers.
        tie = (sender - layer[now, None]) % topology.num_ranks
        cost = busy[layer[now, None], sender] * topology.num_ranks + tie
        best = np.where(usable[now], cost, np.iinfo(np.int64).max).argmin(1)
        chosen[now] = replicas[now, best]
        busy[layer[now], chosen[now] // topology.slots_per_rank] += 1
    return chosen


def _tensor(array: _Ints) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
