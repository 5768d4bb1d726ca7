"""Running the compiled kernels on tensors of the CPU, without the interpreter lock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..core.topology import Topology
from .layer_threads import WORTH_THREADS_TO_SUM, over_layers

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
    """The best of several candidates per layer: greedy counts, longest processing time, swaps and changes.

    Args:
        weight: float64 [snapshots, layers, logical] on the CPU.
        topology: nodes, ranks and slots.
        expert_node: int64 [layers, logical], the node of each expert.
        rounds, candidates, patience, tolerance, seed: as in `kernels.plan_layers`.

    Returns:
        physical_to_logical: int64 [layers, slots].
    """
    none = torch.empty((weight.shape[1], 0), dtype=torch.int64, device="cpu")
    return _run(
        weight, topology, expert_node, none, none, 0.0, 0, rounds, candidates, patience, tolerance, seed
    )


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
    """Improve `start` [layers, slots] by swaps and changes of replicas that earn the price of their moves.

    Moves are counted from `current` [layers, slots], which is `start` or, where something had to be
    completed, lacks some of it (-1). Experts stay on the node where they are, or go all to their
    `expert_node` [layers, logical] where that is better. The rest is as for `plan_from_scratch`.
    """
    return _run(weight, topology, expert_node, current, start, price, max_moves, rounds, 1, 1, tolerance, 0)


def choose_nodes(
    weight: torch.Tensor,
    topology: Topology,
    current: torch.Tensor,
    start: torch.Tensor,
    *,
    price: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which node each group should be on, so that the heaviest is light enough for the price of the moves.

    Args:
        weight: float64 [snapshots, layers, logical] on the CPU.
        topology: nodes, ranks, slots and groups.
        current: int64 [layers, slots], what is held now, -1 for an empty slot.
        start: int64 [layers, slots], the same, complete.
        price: what a move costs, as a share of the mean rank load.

    Returns:
        expert_node: int64 [layers, logical].
        start: int64 [layers, slots], with -2 where groups span nodes and an expert has to leave its node.
    """
    from . import kernels

    expert_node = np.zeros(weight.shape[1:], _INT64)
    if topology.num_nodes == 1:
        return torch.from_numpy(expert_node), start
    held, begin = (_array(topology.by_rank(ids, -1).flatten(1)) for ids in (current, start))
    begin = begin.copy()
    load = _array(weight)
    fee = price / topology.ranks_per_node
    over_layers(
        lambda first, last: kernels.choose_nodes(
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
    """Pack items instead of replicas: float64 [snapshots, X, n] to pack_index and rank_in_pack [X, n]."""
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
    """A lower bound on the peak of ranks that hold all of a load and nothing else, see `kernels.rank_bounds`.

    Args:
        load: float64 [X, experts], any device.
        rank_slots: slots of each rank, no fewer than experts.

    Returns:
        float64 [X], on that device.
    """
    from .kernels import bound_rows

    bound = np.empty(len(load))
    bound_rows(_array(load.cpu()), np.array(rank_slots, _INT64), bound)
    return torch.from_numpy(bound).to(load.device)


def step_peaks(weight: torch.Tensor, physical_to_logical: torch.Tensor, topology: Topology) -> torch.Tensor:
    """The peak rank load of each snapshot and layer, float64 [snapshots, layers], of a load on the CPU."""
    from . import table_kernels

    peaks = np.empty(weight.shape[:2])
    load, ids = _array(weight), _array(physical_to_logical)
    first_slot = np.array(topology.first_slots, _INT64)
    over_layers(
        lambda first, last: table_kernels.peak_loads(load, ids, first_slot, first, last, peaks),
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
    """Sum the snapshots of each bin, weighted, and move them to the mean that is expected next, see
    `forecast.expected_load`.

    Args:
        load: float64 [snapshots, layers, logical] on the CPU, tokens.
        weights: of each snapshot.
        bins: where each snapshot belongs, every number from 0 on.
        recency, persistence, decay: as there.

    Returns:
        float64 [bins, layers, logical], tokens.
    """
    from . import forecast_kernels

    condensed = np.zeros((max(bins) + 1, *load.shape[1:]))
    array, weight, place = _array(load), np.array(weights), np.array(bins, _INT64)
    over_layers(
        lambda first, last: forecast_kernels.expect_loads(
            array, weight, place, recency, persistence, decay, first, last, condensed
        ),
        load,
        WORTH_THREADS_TO_SUM,
    )
    return torch.from_numpy(condensed)


def keep_slots(
    new: torch.Tensor, current: torch.Tensor, topology: Topology, num_logical: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`new` with the slots of each rank in an order in which experts that stay keep theirs.

    Args:
        new, current: int64 [layers, slots] on the CPU, experts below `num_logical`; -1 in `current` for an
            empty slot.

    Returns:
        int64 [layers, slots]; and int64 [layers] each: experts that a rank gets and did not hold, and slots
        of `new`, and of `current`, that repeat an expert of their rank.
    """
    from . import table_kernels

    ids, in_force, first_slot = _array(new), _array(current), np.array(topology.first_slots, _INT64)
    kept, moves = np.empty_like(ids), np.empty(len(ids), _INT64)
    shared = np.empty((2, len(ids)), _INT64)
    table_kernels.keep_slots(ids, in_force, first_slot, num_logical, kept, moves, shared)
    after, before = torch.from_numpy(shared)
    return torch.from_numpy(kept), torch.from_numpy(moves), after, before


def count_shared(physical_to_logical: torch.Tensor, topology: Topology, num_logical: int) -> torch.Tensor:
    """Slots that repeat an expert of their rank, int64 [layers], of a placement on the CPU."""
    from . import table_kernels

    shared = np.empty(len(physical_to_logical), _INT64)
    first_slot = np.array(topology.first_slots, _INT64)
    table_kernels.count_shared(_array(physical_to_logical), first_slot, num_logical, shared)
    return torch.from_numpy(shared)


def _run(
    weight: torch.Tensor,
    topology: Topology,
    expert_node: torch.Tensor,
    current: torch.Tensor,
    start: torch.Tensor,
    price: float,
    max_moves: int,
    rounds: int,
    candidates: int,
    patience: int,
    tolerance: float,
    seed: int,
) -> torch.Tensor:
    # Importing numba takes a while and reads the environment: only when it is needed.
    from . import kernels

    num_layers = weight.shape[1]
    if not topology.is_even and start.shape[1]:
        current, start = (topology.by_rank(ids, -1).flatten(1) for ids in (current, start))
    result = np.empty((num_layers, topology.num_ranks * topology.most_slots), _INT64)
    room = np.array(topology.slots_by_rank, _INT64)
    load, node, held, begin = (_array(x) for x in (weight, expert_node, current, start))

    def work(first: int, last: int) -> None:
        kernels.plan_layers(
            load, first, last, topology.num_ranks, topology.ranks_per_node, room, node, held, begin, price,
            max_moves, rounds, candidates, patience, tolerance, seed, result,
        )  # fmt: skip

    over_layers(work, weight)
    return topology.from_ranks(torch.from_numpy(result).view(num_layers, topology.num_ranks, -1))


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(tensor.detach().numpy())
