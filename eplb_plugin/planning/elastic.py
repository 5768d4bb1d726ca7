"""Planning after ranks failed or joined.

Policies never see a dead rank: the active ranks are planned as a topology of their own. A placement in force
that lacks slots or experts is completed first, with the fewest moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..core.errors import TopologyError
from ..core.load import to_exact
from ..core.placement import Placement
from ..core.topology import Topology

__all__ = [
    "ActivePart",
    "CompletedPlacement",
    "active_part",
    "complete",
    "complete_placement",
    "held_slots",
    "missing_experts",
]

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ActivePart:
    """The part of a topology that can hold experts.

    Attributes:
        topology: of the ranks that are alive and have slots, in their order. It has one node if the nodes
            differ in active ranks.
        slots: the slots of the active ranks in the whole topology; None if all ranks are active.
        rank_slots: usable slots of each rank of the whole topology, 0 for a dead one.
        num_slots: slots over all ranks, dead ones included.
    """

    topology: Topology
    slots: tuple[int, ...] | None
    rank_slots: tuple[int, ...]
    num_slots: int

    def compact(self, ids: torch.Tensor) -> torch.Tensor:
        """[layers, slots] over all ranks to [layers, active slots]."""
        return ids if self.slots is None else ids[:, list(self.slots)]

    def expand(self, ids: torch.Tensor) -> torch.Tensor:
        """[layers, active slots] to [layers, slots] over all ranks, -1 on dead ranks."""
        if self.slots is None:
            return ids
        every = ids.new_full((ids.shape[0], self.num_slots), -1)
        every[:, list(self.slots)] = ids
        return every


def active_part(
    topology: Topology, active_ranks: Sequence[bool] | torch.Tensor | None, num_logical: int
) -> ActivePart:
    """Leave out ranks that are dead by `active_ranks` (bool [ranks], None: all are alive) or have no slots.

    Raises:
        TopologyError: a malformed mask, no rank left, or fewer slots than `num_logical` experts.
    """
    alive = topology.living_ranks(active_ranks)
    topology.check_experts(num_logical)
    rank_slots = tuple(
        slots if lives else 0 for slots, lives in zip(topology.slots_by_rank, alive, strict=True)
    )
    kept = [rank for rank, slots in enumerate(rank_slots) if slots]
    if len(kept) == topology.num_ranks:
        return ActivePart(topology, None, rank_slots, topology.num_slots)
    num_slots = sum(rank_slots)
    if num_slots < num_logical:
        raise TopologyError(
            f"num_logical={num_logical} experts do not fit into the {num_slots} slots of the "
            f"{sum(alive)} living ranks of {topology.num_ranks}"
        )
    per_node = [0] * topology.num_nodes
    for rank in kept:
        per_node[rank // topology.ranks_per_node] += 1
    left = Topology(
        num_nodes=topology.num_nodes if len(set(per_node)) == 1 else 1,
        num_ranks=len(kept),
        num_slots=num_slots,
        num_groups=topology.num_groups,
        rank_slots=tuple(rank_slots[rank] for rank in kept),
    )
    first = topology.first_slots
    slots = tuple(slot for rank in kept for slot in range(first[rank], first[rank + 1]))
    return ActivePart(left, slots, rank_slots, topology.num_slots)


class CompletedPlacement(Placement):
    """A placement in force whose empty slots and missing experts were filled, to plan from.

    `held`, int64 [layers, slots], is the table before completion, -1 for an empty slot. Moves are counted
    from it: the weights of what was filled in have to be transferred, wherever it ends.
    """

    def __init__(self, physical_to_logical: torch.Tensor, num_logical: int, held: torch.Tensor) -> None:
        super().__init__(physical_to_logical, num_logical)
        self.held = held


def held_slots(placement: Placement) -> torch.Tensor:
    """int64 [layers, slots]: the experts that ranks hold, without those of a completion."""
    return placement.held if isinstance(placement, CompletedPlacement) else placement.physical_to_logical


def complete_placement(
    held: torch.Tensor, num_logical: int, load: torch.Tensor, topology: Topology
) -> Placement:
    """`held`, int64 [layers, slots], as a placement; completed where slots are empty or experts missing. The
    arguments are those of `complete`."""
    if bool((held < 0).any()) or missing_experts(held, num_logical):
        return CompletedPlacement(complete(held, load, topology), num_logical, held)
    return Placement(held, num_logical)


def missing_experts(ids: torch.Tensor, num_logical: int) -> tuple[tuple[int, int], ...]:
    """(layer, expert), in rising order, of the experts without a slot in `ids` [layers, slots]."""
    held = torch.zeros((ids.shape[0], num_logical + 1), dtype=torch.bool, device=ids.device)
    held.scatter_(1, ids + 1, True)
    return tuple((layer, expert) for layer, expert in (~held[:, 1:]).nonzero().tolist())


def complete(ids: torch.Tensor, load: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Give every missing expert a slot and every empty slot an expert; what is held stays where possible.

    Missing experts, the heaviest first, go to empty slots of the lightest ranks. Without an empty slot, an
    expert replaces the surplus replica whose loss raises the peak least. The remaining empty slots get the
    replicas that minimise the sum of squared rank loads. Groups stay within nodes if `ids` has them there, no
    more than its share on each node. Otherwise the layer is completed globally; the policy brings its groups
    together.

    Args:
        ids: int64 [layers, slots] on the CPU, -1 for an empty slot; so is the result, without empty slots.
        load: float64 [snapshots, layers, logical] on the CPU, tokens.
        topology: as from `effective_topology`.
    """
    weight = to_exact(load.sum(0, keepdim=True))[0].numpy()
    rows = ids.numpy().copy()
    for row, weight_of in zip(rows, weight, strict=True):
        held = np.bincount(row + 1, minlength=weight.shape[1] + 1)
        if held[0] or not held.all():
            _Layer(row, weight_of, topology).complete()
    return torch.from_numpy(rows)


class _Layer:
    """One layer while it is completed. `row`, int64 [slots], is written in place."""

    def __init__(self, row: _Ints, weight: _Floats, topology: Topology) -> None:
        self.row = row
        # Without any load, all experts weigh the same.
        self.weight = weight if weight.any() else np.ones_like(weight)
        self.rank = topology.rank_of_slot().numpy()
        self.num_ranks = topology.num_ranks
        self.node_of_rank = np.arange(topology.num_ranks) // topology.ranks_per_node
        expert_node = _expert_nodes(row, len(weight), topology)
        if expert_node is None:
            self.node_of_rank[:] = 0
            expert_node = np.zeros(len(weight), np.int64)
        self.expert_node = expert_node
        # [ranks, logical]: how many slots of a rank hold an expert.
        self.held = np.zeros((self.num_ranks, len(weight)), np.int64)
        filled = row >= 0
        np.add.at(self.held, (self.rank[filled], row[filled]), 1)
        self.count = self.held.sum(0)

    def complete(self) -> None:
        missing = np.flatnonzero(self.count == 0)
        for expert in missing[np.argsort(-self.weight[missing], kind="stable")]:
            near = self.node_of_rank[self.rank] == self.expert_node[expert]
            empty = near & (self.row < 0)
            if empty.any():
                load = np.where(empty, self._rank_loads()[self.rank], np.inf)
                self._put(int(expert), int(load.argmin()))
            else:
                self._put(int(expert), self._least_needed(int(expert), near))
        for _ in range(int((self.row < 0).sum())):
            self._fill()

    def _put(self, expert: int, slot: int) -> None:
        old, rank = self.row[slot], self.rank[slot]
        if old >= 0:
            self.held[rank, old] -= 1
            self.count[old] -= 1
        self.row[slot] = expert
        self.held[rank, expert] += 1
        self.count[expert] += 1

    def _rank_loads(self) -> _Floats:
        """float64 [ranks]; bincount adds in the order of the slots, the same on every machine."""
        ids = np.maximum(self.row, 0)
        share = np.where(self.row >= 0, self.weight[ids] / np.maximum(self.count[ids], 1), 0.0)
        return np.bincount(self.rank, share, self.num_ranks).astype(np.float64, copy=False)

    def _least_needed(self, expert: int, near: npt.NDArray[np.bool_]) -> int:
        """The slot of the surplus replica whose change to `expert` leaves the lowest peak.

        Ties go to the lowest peak among the ranks that the change affects.
        """
        slot = np.flatnonzero(near & (self.count[self.row] > 1))
        old, rank, each = self.row[slot], self.rank[slot], np.arange(slot.size)
        weight, count = self.weight[old], self.count[old]
        left = self.held[:, old].T.copy()
        left[each, rank] -= 1
        # Load of the replicas that stay, less the load of all of them now.
        change = left * (weight / (count - 1))[:, None] - self.held[:, old].T * (weight / count)[:, None]
        change[each, rank] += self.weight[expert]
        after = self._rank_loads() + change
        touched = left > 0
        touched[each, rank] = True
        local = np.where(touched, after, 0.0).max(1)
        return int(slot[np.lexsort((local, after.max(1)))[0]])

    def _fill(self) -> None:
        """Fill one empty slot with the replica that leaves the smallest sum of squared rank loads."""
        room = np.bincount(self.rank[self.row < 0], minlength=self.num_ranks) > 0
        fits = room[:, None] & (self.node_of_rank[:, None] == self.expert_node)
        lacking = fits & (self.held == 0)
        # A rank of more slots than experts has to repeat some.
        useful = lacking if lacking.any() else fits
        load = self._rank_loads()
        # Load that each present replica gives up, and total load of the ranks that hold one.
        relief = self.weight / (self.count * (self.count + 1))
        filled = self.row >= 0
        weighs = np.bincount(self.row[filled], load[self.rank[filled]], len(self.weight))
        lighter = relief * relief * (self.held * self.held).sum(0) - 2 * relief * weighs
        arriving = self.weight / (self.count + 1)
        heavier = arriving * (2 * (load[:, None] - relief * self.held) + arriving)
        change = np.where(useful, lighter + heavier, np.inf)
        rank, expert = divmod(int(change.argmin()), len(self.weight))
        self._put(expert, int(np.flatnonzero((self.rank == rank) & (self.row < 0))[0]))


def _expert_nodes(row: _Ints, num_logical: int, topology: Topology) -> _Ints | None:
    """The node of each expert, int64 [logical], which is that of its group; lost groups go to the nodes with
    the fewest groups. None where groups span nodes, or a node has more groups than its share."""
    if topology.num_nodes == 1:
        return np.zeros(num_logical, np.int64)
    group_size = num_logical // topology.num_groups
    filled = np.flatnonzero(row >= 0)
    group, node = row[filled] // group_size, filled // topology.slots_per_node
    node_of_group = np.full(topology.num_groups, -1)
    node_of_group[group] = node
    if (node_of_group[group] != node).any():
        return None
    members = np.bincount(node_of_group[node_of_group >= 0], minlength=topology.num_nodes)
    if members.max() > topology.num_groups // topology.num_nodes:
        return None
    for lost in np.flatnonzero(node_of_group < 0):
        node_of_group[lost] = members.argmin()
        members[node_of_group[lost]] += 1
    return node_of_group.repeat(group_size)
