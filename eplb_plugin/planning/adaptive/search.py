"""The default planner on the CPU: grow from the placement in force, or search from scratch and relabel."""

from __future__ import annotations

import torch

from ...config.options import PlannerOptions
from ...core.load import sum_over_last
from ...core.topology import Topology
from ..compiled import choose_nodes, grow, pack_rows, plan_from_scratch, step_peaks
from ..groups_to_nodes import MOST_PACKINGS, best_nodes, num_packings
from .rank_matching import overlap_ranks

__all__ = ["search_placement"]

_ROUNDS = 10  # compiled rounds for each of `PlannerOptions.refine_rounds`
_GROUP_PATIENCE = 8  # the same for packing groups of a single load: few items, and all else depends on it
_GROUP_DISCOUNT = 0.5  # measured: what a group gains lasts longer than what an expert gains
_PATIENCE = 1  # candidates from scratch that may fail to improve on the best


def search_placement(
    load: torch.Tensor,
    topology: Topology,
    options: PlannerOptions,
    current: torch.Tensor | None,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plan with the compiled kernels.

    With a placement in force, exchanges that earn their price are made to it, one after the other, those of
    whole groups between nodes first. A layer is planned from scratch where there is none, and, when moves are
    free, where that gives the lower peak; its ranks are then named for the most overlap.

    Args:
        load: float64 [snapshots, layers, logical] on the CPU, weighted by snapshot.
        topology: as from `effective_topology`.
        options: effort, price and bound of moves.
        current: int64 [layers, slots] on the CPU, or None; where `start` is given it may have empty slots
            (-1) and lack experts.
        start: int64 [layers, slots] on the CPU, `current` completed; None is `current`.

    Returns:
        physical_to_logical: int64 [layers, slots].
    """
    if current is None:
        return _from_scratch(load, topology, options)
    if start is None:
        start = current
    price = _GROUP_DISCOUNT * _price_of_move(topology, options)
    node, start = choose_nodes(load, topology, current, start, price=price)
    ids = _grow(load, topology, options, current, start, node)
    if options.move_price == 0 and options.max_moves is None:
        fresh = overlap_ranks(_from_scratch(load, topology, options), current, topology)
        peaks = [step_peaks(load, x, topology).sum(0) for x in (fresh, ids)]
        ids = torch.where((peaks[0] < peaks[1])[:, None], fresh, ids)
    return ids


def _grow(
    load: torch.Tensor,
    topology: Topology,
    options: PlannerOptions,
    current: torch.Tensor,
    start: torch.Tensor,
    node: torch.Tensor,
) -> torch.Tensor:
    return grow(
        load,
        topology,
        current,
        start,
        node,
        price=_price_of_move(topology, options),
        max_moves=topology.num_slots if options.max_moves is None else options.max_moves,
        rounds=_ROUNDS * options.refine_rounds,
        tolerance=options.tolerance,
    )


def _price_of_move(topology: Topology, options: PlannerOptions) -> float:
    """As a share of the mean rank load."""
    return options.move_price / (topology.num_slots / topology.num_ranks)


def _from_scratch(load: torch.Tensor, topology: Topology, options: PlannerOptions) -> torch.Tensor:
    rounds = _ROUNDS * options.refine_rounds
    node = _expert_nodes(load, topology, options)
    ids = plan_from_scratch(
        load,
        topology,
        node,
        rounds=rounds,
        # Of several snapshots, further candidates gain 0.1 to 0.2 % on these and nothing on the next ones.
        candidates=options.num_candidates if load.shape[0] == 1 else 1,
        patience=_PATIENCE,
        tolerance=options.tolerance,
        seed=options.seed,
    )
    if not topology.is_even:
        # Handing out by load alone gives a rank of many slots too much, which takes other counts to mend.
        free = options.model_copy(update={"move_price": 0.0, "max_moves": None})
        grown = _grow(load, topology, free, ids, ids, node)
        before, after = (step_peaks(load, x, topology).sum(0) for x in (ids, grown))
        ids = torch.where((after < before)[:, None], grown, ids)
    return ids


def _expert_nodes(load: torch.Tensor, topology: Topology, options: PlannerOptions) -> torch.Tensor:
    """Pack groups to nodes: int64 [layers, logical], the node of each expert."""
    num_snapshots, num_layers, num_logical = load.shape
    if topology.num_nodes == 1:
        return torch.zeros((num_layers, num_logical), dtype=torch.int64, device="cpu")
    group_size = num_logical // topology.num_groups
    group_load = sum_over_last(load.view(num_snapshots, num_layers, topology.num_groups, group_size))
    if num_packings(topology.num_groups, topology.num_nodes) <= MOST_PACKINGS:
        return best_nodes(group_load, topology.num_nodes).repeat_interleave(group_size, dim=1)
    node, _ = pack_rows(
        group_load,
        topology.num_nodes,
        rounds=_ROUNDS * options.refine_rounds,
        candidates=options.num_candidates,
        patience=_GROUP_PATIENCE if num_snapshots == 1 else _PATIENCE,
        tolerance=options.tolerance,
        seed=options.seed,
    )
    return node.repeat_interleave(group_size, dim=1)
