"""The compiled kernels as functions on tensors of the CPU, for the rest of planning.

Kernels are imported within functions: importing numba takes a while and reads the environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...core.topology import Topology
from .threads import WORTH_THREADS_TO_SUM, over_layers

if TYPE_CHECKING:
    from .plan_layers import Problem

__all__ = [
    "choose_nodes",
    "count_shared",
    "expect_loads",
    "grow",
    "keep_slots",
    "pack_rows",
    "plan_from_scratch",
    "shared_bounds",
    "step_peaks",
]

_INT64 = np.dtype(np.int64)
_UNBOUNDED = 1 << 40


def plan_from_scratch(
    weight: torch.Tensor,
    topology: Topology,
    expert_node: torch.Tensor,
    *,
    rounds: int,
    candidates: int,
    patience: int,
    tolerance: float,
    seed: int,
) -> torch.Tensor:
    """Plan each layer from greedy replica counts and LPT packings, improved by swaps and replica changes.

    Args:
        weight: float64 [snapshots, layers, logical] on the CPU, tokens times the weight of their snapshot.
        topology: nodes, ranks and slots.
        expert_node: int64 [layers, logical], the node of each expert.
        rounds, candidates, patience, tolerance, seed: as in `plan_layers.Problem`.

    Returns:
        physical_to_logical: int64 [layers, slots].
    """
    from .plan_layers import Problem

    none = np.empty((weight.shape[1], 0), _INT64)
    problem = Problem(
        weight=_array(weight),
        expert_node=_array(expert_node),
        current=none,
        start=none,
        rank_slots=np.array(topology.slots_by_rank, _INT64),
        ranks_per_node=topology.ranks_per_node,
        price=0.0,
        max_moves=_UNBOUNDED,
        rounds=rounds,
        candidates=candidates,
        patience=patience,
        tolerance=tolerance,
        seed=seed,
    )
    return _plan(problem, weight, topology)


def grow(
    weight: torch.Tensor,
    topology: Topology,
    current: torch.Tensor,
    start: torch.Tensor,
    expert_node: torch.Tensor,
    *,
    price: float,
    max_moves: int,
    rounds: int,
    tolerance: float,
) -> torch.Tensor:
    """Improve a placement by swaps and replica changes that earn the price of their moves.

    Args:
        weight, topology: as for `plan_from_scratch`.
        current: int64 [layers, slots], the placement in force, -1 for an empty slot; moves are counted from
            it.
        start: int64 [layers, slots], `current` completed, where the search begins.
        expert_node: int64 [layers, logical]. Experts stay on their node, or all go to their `expert_node`
            where that is better.
        price: of one move, as a fraction of the mean rank load.
        max_moves: most moves of a layer.
        rounds, tolerance: as in `plan_layers.Problem`.

    Returns:
        physical_to_logical: int64 [layers, slots].
    """
    from .plan_layers import Problem

    if not topology.is_even:
        current, start = (topology.by_rank(ids, -1).flatten(1) for ids in (current, start))
    problem = Problem(
        weight=_array(weight),
        expert_node=_array(expert_node),
        current=_array(current),
        start=_array(start),
        rank_slots=np.array(topology.slots_by_rank, _INT64),
        ranks_per_node=topology.ranks_per_node,
        price=price,
        max_moves=max_moves,
        rounds=rounds,
        candidates=1,
        patience=1,
        tolerance=tolerance,
        seed=0,
    )
    return _plan(problem, weight, topology)


def _plan(problem: Problem, weight: torch.Tensor, topology: Topology) -> torch.Tensor:
    from .plan_layers import plan_layers

    slot_expert = np.empty((weight.shape[1], topology.num_ranks * topology.most_slots), _INT64)
    over_layers(lambda first, last: plan_layers(problem, first, last, slot_expert), weight)
    by_rank = torch.from_numpy(slot_expert).view(len(slot_expert), topology.num_ranks, -1)
    return topology.from_ranks(by_rank)


def choose_nodes(
    weight: torch.Tensor,
    topology: Topology,
    current: torch.Tensor,
    start: torch.Tensor,
    *,
    price: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the node of each group: the load of the heaviest node against the price of the moves.

    Args:
        weight: float64 [snapshots, layers, logical] on the CPU, tokens times the weight of their snapshot.
        topology: nodes, ranks, slots and groups.
        current: int64 [layers, slots], the placement in force, -1 for an empty slot.
        start: int64 [layers, slots], `current` completed.
        price: of one move, as a fraction of the mean rank load.

    Returns:
        expert_node: int64 [layers, logical].
        start: int64 [layers, slots], with -2 where groups span nodes and an expert has to leave its node.
    """
    from . import group_to_node

    expert_node = np.zeros(weight.shape[1:], _INT64)
    if topology.num_nodes == 1:
        return torch.from_numpy(expert_node), start
    held, begin = (_array(topology.by_rank(ids, -1).flatten(1)) for ids in (current, start))
    begin = begin.copy()
    load = _array(weight)
    fee = price / topology.ranks_per_node
    over_layers(
        lambda first, last: group_to_node.choose_nodes(
            load, first, last, topology.num_nodes, topology.num_groups, fee, held, begin, expert_node
        ),
        weight,
    )
    shape = (len(begin), topology.num_ranks, -1)
    return torch.from_numpy(expert_node), topology.from_ranks(torch.from_numpy(begin).view(shape))


def pack_rows(
    weight: torch.Tensor,
    num_packs: int,
    *,
    rounds: int,
    candidates: int,
    patience: int,
    tolerance: float,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack items rather than replicas, with the search of `plan_from_scratch`.

    Args:
        weight: float64 [snapshots, X, n] on the CPU.
        num_packs: packs of n / num_packs items each.
        rounds, candidates, patience, tolerance, seed: as in `plan_layers.Problem`.

    Returns:
        pack_index, rank_in_pack: int64 [X, n] each.
    """
    topology = Topology(num_ranks=num_packs, num_slots=weight.shape[2])
    items = plan_from_scratch(
        weight,
        topology,
        torch.zeros(weight.shape[1:], dtype=torch.int64, device="cpu"),
        rounds=rounds,
        candidates=candidates,
        patience=patience,
        tolerance=tolerance,
        seed=seed,
    )
    place = torch.arange(items.shape[1], device="cpu").expand_as(items)
    slot = torch.empty_like(items).scatter_(1, items, place)
    return slot // topology.slots_per_rank, slot % topology.slots_per_rank


def shared_bounds(load: torch.Tensor, rank_slots: Sequence[int]) -> torch.Tensor:
    """A lower bound on the peak of ranks that share all experts of a load, see `lower_bounds`.

    Args:
        load: float64 [X, experts], any device.
        rank_slots: slots of each rank; together no fewer than experts.

    Returns:
        float64 [X], on that device.
    """
    from .lower_bounds import bound_rows

    bound = np.empty(len(load))
    bound_rows(_array(load.cpu()), np.array(rank_slots, _INT64), bound)
    return torch.from_numpy(bound).to(load.device)


def step_peaks(weight: torch.Tensor, physical_to_logical: torch.Tensor, topology: Topology) -> torch.Tensor:
    """The peak rank load of each snapshot and layer.

    Args:
        weight: float64 [snapshots, layers, logical] on the CPU, tokens.
        physical_to_logical: int64 [layers, slots] on the CPU.

    Returns:
        float64 [snapshots, layers], tokens.
    """
    from . import placement_tables

    peaks = np.empty(weight.shape[:2])
    load, ids = _array(weight), _array(physical_to_logical)
    first_slot = np.array(topology.first_slots, _INT64)
    over_layers(
        lambda first, last: placement_tables.peak_loads(load, ids, first_slot, first, last, peaks),
        weight,
        WORTH_THREADS_TO_SUM,
    )
    return torch.from_numpy(peaks)


def expect_loads(
    load: torch.Tensor,
    weights: list[float],
    bins: list[int],
    recency: float,
    persistence: float,
    decay: float,
) -> torch.Tensor:
    """Sum the snapshots of each bin, weighted, and shift them to the forecast of `planning.forecast`.

    Args:
        load: float64 [snapshots, layers, logical] on the CPU, tokens.
        weights: of each snapshot.
        bins: bin of each snapshot; each number from 0 on occurs.
        recency: weight of a snapshot relative to the next one, in the load of the moment.
        persistence: from 0, the mean of the window, to 1, the load of the moment.
        decay: weight of a snapshot relative to the next one, in the window.

    Returns:
        float64 [bins, layers, logical], tokens.
    """
    from . import forecast

    condensed = np.zeros((max(bins) + 1, *load.shape[1:]))
    array, weight, place = _array(load), np.array(weights), np.array(bins, _INT64)
    over_layers(
        lambda first, last: forecast.expect_loads(
            array, weight, place, recency, persistence, decay, first, last, condensed
        ),
        load,
        WORTH_THREADS_TO_SUM,
    )
    return torch.from_numpy(condensed)


def keep_slots(
    new: torch.Tensor, current: torch.Tensor, topology: Topology, num_logical: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reorder the slots of each rank so that experts which stay keep their slots.

    Args:
        new, current: int64 [layers, slots] on the CPU, experts below `num_logical`; -1 in `current` for an
            empty slot.

    Returns:
        `new` reordered, int64 [layers, slots]; and int64 [layers] each: moves, slots of `new` that repeat an
        expert of their rank, and the same of `current`.
    """
    from . import placement_tables

    ids, in_force, first_slot = _array(new), _array(current), np.array(topology.first_slots, _INT64)
    kept, moves = np.empty_like(ids), np.empty(len(ids), _INT64)
    shared = np.empty((2, len(ids)), _INT64)
    placement_tables.keep_slots(ids, in_force, first_slot, num_logical, kept, moves, shared)
    after, before = torch.from_numpy(shared)
    return torch.from_numpy(kept), torch.from_numpy(moves), after, before


def count_shared(physical_to_logical: torch.Tensor, topology: Topology, num_logical: int) -> torch.Tensor:
    """Slots that repeat an expert of their rank: int64 [layers], of a placement on the CPU."""
    from . import placement_tables

    shared = np.empty(len(physical_to_logical), _INT64)
    first_slot = np.array(topology.first_slots, _INT64)
    placement_tables.count_shared(_array(physical_to_logical), first_slot, num_logical, shared)
    return torch.from_numpy(shared)


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(tensor.detach().numpy())
