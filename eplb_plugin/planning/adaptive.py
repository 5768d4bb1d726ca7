"""The policy `adaptive`: priced exchanges from the placement in force, by compiled search."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..config.options import PlannerOptions
from ..core.load import sum_over_last
from ..core.placement import Placement
from ..core.topology import Topology
from .anti_affinity import set_replicas_apart
from .elastic import held_slots
from .hierarchy import MOST_PACKINGS, best_nodes, num_packings
from .kernels.api import choose_nodes, grow, plan_from_scratch, step_peaks

__all__ = ["Adaptive"]

_CANDIDATES = 128  # plans from scratch of a single load, and packings of its groups
_PATIENCE = 1  # candidates in a row that may fail to improve on the best
_GROUP_PATIENCE = 8  # the same for packing groups of a single load: few items, and all else depends on it
_LEAST_PRICE = 0.05  # least factor on the price of a move, where traffic is steady
_GROUP_DISCOUNT = 0.5  # measured: the gain of moving a group lasts longer than that of an expert


@dataclass(frozen=True)
class Adaptive:
    """Makes the exchanges to the placement in force that earn their price, groups between nodes first.

    A layer is planned from scratch where nothing is in force. With `move_price` 0 and no `max_moves`, it also
    is where that gives the lower peak; ranks are then matched for the most overlap.
    """

    options: PlannerOptions

    def __call__(self, window: torch.Tensor, topology: Topology, current: Placement | None) -> Placement:
        load = window.cpu()
        held = None
        if current is None:
            ids = _from_scratch(load, topology)
        else:
            held, start = held_slots(current).cpu(), current.physical_to_logical.cpu()
            ids = self._from_placement(load, topology, held, start)
        ids = set_replicas_apart(ids, load, topology, held, self.options.max_moves)
        return Placement(ids, load.shape[2])

    def _from_placement(
        self, load: torch.Tensor, topology: Topology, held: torch.Tensor, start: torch.Tensor
    ) -> torch.Tensor:
        """int64 [layers, slots]; so are `held` and `start`, the placement before and after its completion."""
        options = self.options
        # The kernels take the price as a fraction of the mean rank load.
        price = options.known_price / (topology.num_slots / topology.num_ranks)
        # The search after the split has prices of its own, and does best from a plan that moves little.
        least = 1.0 if options.dispatch == "balanced" else _LEAST_PRICE
        node, start = choose_nodes(load, topology, held, start, _GROUP_DISCOUNT * price, least)
        most = topology.num_slots if options.max_moves is None else options.max_moves
        ids = grow(load, topology, held, start, node, price=price, least_price=least, max_moves=most)
        if options.known_price == 0 and options.max_moves is None:
            fresh = match_ranks(_from_scratch(load, topology), held, topology)
            ids = _better(fresh, ids, load, topology)
        return ids


def _from_scratch(load: torch.Tensor, topology: Topology) -> torch.Tensor:
    """int64 [layers, slots] of a load, float64 [snapshots, layers, logical]."""
    node = _expert_nodes(load, topology)
    # With several snapshots, further candidates gain 0.1 to 0.2 % on these and nothing on the next ones.
    candidates = _CANDIDATES if load.shape[0] == 1 else 1
    ids = plan_from_scratch(load, topology, node, candidates=candidates, patience=_PATIENCE)
    if not topology.is_even:
        # LPT packing gives a rank of many slots too much load, which other replica counts mend.
        grown = grow(load, topology, ids, ids, node, price=0.0, least_price=1.0, max_moves=topology.num_slots)
        ids = _better(grown, ids, load, topology)
    return ids


def _better(
    ids: torch.Tensor, otherwise: torch.Tensor, load: torch.Tensor, topology: Topology
) -> torch.Tensor:
    """Of each layer the placement with the lower peak rank load, summed over the snapshots."""
    first, second = (step_peaks(load, x, topology).sum(0) for x in (ids, otherwise))
    return torch.where((first < second)[:, None], ids, otherwise)


def _expert_nodes(load: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Pack groups to nodes: int64 [layers, logical], the node of each expert."""
    num_snapshots, num_layers, num_logical = load.shape
    if topology.num_nodes == 1:
        return torch.zeros((num_layers, num_logical), dtype=torch.int64, device="cpu")
    group_size = num_logical // topology.num_groups
    group_load = sum_over_last(load.view(num_snapshots, num_layers, topology.num_groups, group_size))
    if num_packings(topology.num_groups, topology.num_nodes) <= MOST_PACKINGS:
        return best_nodes(group_load, topology.num_nodes).repeat_interleave(group_size, dim=1)
    # Groups are packed to nodes by the search that packs experts to ranks.
    nodes = Topology(num_ranks=topology.num_nodes, num_slots=topology.num_groups)
    together = torch.zeros(group_load.shape[1:], dtype=torch.int64, device="cpu")
    patience = _GROUP_PATIENCE if num_snapshots == 1 else _PATIENCE
    groups = plan_from_scratch(group_load, nodes, together, candidates=_CANDIDATES, patience=patience)
    node = torch.empty_like(groups).scatter_(1, groups, nodes.rank_of_slot().expand_as(groups))
    return node.repeat_interleave(group_size, dim=1)


def match_ranks(physical_to_logical: torch.Tensor, current: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Exchange whole ranks within nodes, then whole nodes, for the fewest moves from `current`.

    Ranks of a node with equal slots are interchangeable, and so are nodes: no peak changes. Both are
    assignment problems, solved exactly (Jonker and Volgenant, in scipy).

    Args:
        physical_to_logical: int64 [layers, slots], the new placement; so is the result.
        current: int64 [layers, slots], the placement in force, -1 for an empty slot.
    """
    # scipy is slow to import, and only plans from scratch need it.
    from scipy.optimize import linear_sum_assignment

    nodes, width = topology.num_nodes, topology.ranks_per_node
    new, old = (topology.by_rank(ids, -1).numpy() for ids in (physical_to_logical, current))
    result = np.empty_like(new)
    num_logical = int(max(new.max(), old.max())) + 1
    capacity = np.array(topology.slots_by_rank[:width])
    # Worse than any overlap: ranks with different slots are not interchangeable.
    penalty = np.where(capacity[:, None] == capacity, 0, -topology.num_slots)
    for layer in range(new.shape[0]):
        kept = _held(old[layer], num_logical) @ _held(new[layer], num_logical).T
        worth = np.zeros((nodes, nodes))
        names = np.empty((nodes, nodes, width), np.int64)
        for here in range(nodes):
            for there in range(nodes):
                block = kept[here * width : (here + 1) * width, there * width : (there + 1) * width]
                row, column = linear_sum_assignment(block + penalty, maximize=True)
                worth[here, there] = block[row, column].sum()
                names[here, there] = column
        for here, there in zip(*linear_sum_assignment(worth, maximize=True), strict=True):
            at = slice(here * width, (here + 1) * width)
            result[layer, at] = new[layer, there * width + names[here, there]]
    return topology.from_ranks(torch.from_numpy(result))


def _held(ids: np.ndarray, num_logical: int) -> np.ndarray:
    """float32 [ranks, logical]: 1 where a rank holds an expert."""
    held = np.zeros((ids.shape[0], num_logical + 1), np.float32)
    np.put_along_axis(held, ids, 1.0, axis=1)  # -1 is the last column
    return held[:, :num_logical]
