"""The compiled kernels as functions on tensors of the CPU, for the rest of planning.

Kernels are imported within functions: importing numba takes a while and reads the environment.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from ...core.topology import Topology

__all__ = [
    "choose_nodes",
    "count_shared",
    "expect_loads",
    "grow",
    "improve_splits",
    "keep_slots",
    "over_layers",
    "plan_from_scratch",
    "shared_bounds",
    "split_peaks",
    "step_peaks",
]

_INT64 = np.dtype(np.int64)
_UNBOUNDED = 1 << 40
_ROUNDS = 200  # most exchanges of the search
_TOLERANCE = 5e-4  # the search of a layer ends when its peak is this close to the lower bound
_SEED = 0

_MAX_THREADS = 8
_CHUNKS_PER_THREAD = 16  # layers differ in effort; small chunks even that out
# With fewer loads, starting a thread costs more than it saves: in a search, and in a pass of sums.
_WORTH_THREADS = 4096
_WORTH_THREADS_TO_SUM = 1 << 18


def plan_from_scratch(
    weight: torch.Tensor, topology: Topology, expert_node: torch.Tensor, *, candidates: int, patience: int
) -> torch.Tensor:
    """Plan each layer from greedy replica counts and LPT packings, improved by swaps and replica changes.

    Args:
        weight: float64 [snapshots, layers, logical] on the CPU, tokens times the weight of their snapshot.
        topology: nodes, ranks and slots.
        expert_node: int64 [layers, logical], the node of each expert.
        candidates, patience: as in `plan_layers.Problem`.

    Returns:
        physical_to_logical: int64 [layers, slots].
    """
    none = torch.empty((weight.shape[1], 0), dtype=torch.int64, device="cpu")
    return _plan(weight, topology, expert_node, none, none, 0.0, 1.0, _UNBOUNDED, candidates, patience)


def grow(
    weight: torch.Tensor,
    topology: Topology,
    current: torch.Tensor,
    start: torch.Tensor,
    expert_node: torch.Tensor,
    *,
    price: float,
    least_price: float,
    max_moves: int,
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
        least_price: least factor on the price, where traffic is steady; 1 keeps the price as it is.
        max_moves: most moves of a layer.

    Returns:
        physical_to_logical: int64 [layers, slots].
    """
    current, start = (topology.by_rank(ids, -1).flatten(1) for ids in (current, start))
    return _plan(
        weight, topology, expert_node, current, start, price, least_price, max_moves, candidates=1, patience=1
    )


def _plan(
    weight: torch.Tensor,
    topology: Topology,
    expert_node: torch.Tensor,
    current: torch.Tensor,
    start: torch.Tensor,
    price: float,
    least_price: float,
    max_moves: int,
    candidates: int,
    patience: int,
) -> torch.Tensor:
    from .plan_layers import Problem, plan_layers

    problem = Problem(
        weight=_array(weight),
        expert_node=_array(expert_node),
        current=_array(current),
        start=_array(start),
        rank_slots=np.array(topology.slots_by_rank, _INT64),
        ranks_per_node=topology.ranks_per_node,
        price=price,
        least_price=least_price,
        max_moves=max_moves,
        rounds=_ROUNDS,
        candidates=candidates,
        patience=patience,
        tolerance=_TOLERANCE,
        seed=_SEED,
    )
    slot_expert = np.empty((weight.shape[1], topology.num_ranks * topology.most_slots), _INT64)
    over_layers(lambda first, last: plan_layers(problem, first, last, slot_expert), weight)
    return _from_ranks(slot_expert, topology)


def improve_splits(
    samples: torch.Tensor,
    topology: Topology,
    current: torch.Tensor,
    starts: Sequence[torch.Tensor],
    *,
    price: float,
    max_moves: int | None,
) -> torch.Tensor:
    """Improve placements for balanced dispatch, by exchanges that lower the smooth peak after the split.

    Args:
        samples: float64 [samples, layers, logical] on the CPU, tokens of single steps.
        topology: nodes, ranks and slots. Experts stay on their node.
        current: int64 [layers, slots], the placement that moves are counted from, -1 for an empty slot.
        starts: int64 [layers, slots] each; of each layer the best is improved, of equal ones the last.
        price: of one move, as a fraction of the mean rank load.
        max_moves: most moves of a layer.

    Returns:
        physical_to_logical: int64 [layers, slots].
    """
    from .split_search import SplitProblem, improve_splits

    problem = SplitProblem(
        samples=_array(samples),
        current=_array(current),
        starts=_array(torch.stack(list(starts))),
        rank_of=_array(topology.rank_of_slot()),
        num_ranks=topology.num_ranks,
        ranks_per_node=topology.ranks_per_node,
        price=price,
        max_moves=_UNBOUNDED if max_moves is None else max_moves,
        rounds=_ROUNDS,
    )
    ids = np.empty(current.shape, _INT64)
    over_layers(lambda first, last: improve_splits(problem, first, last, ids), samples)
    return torch.from_numpy(ids)


def choose_nodes(
    weight: torch.Tensor,
    topology: Topology,
    current: torch.Tensor,
    start: torch.Tensor,
    price: float,
    least_price: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the node of each group: the load of the heaviest node against the price of the moves.

    Args:
        weight, topology, current, start, price, least_price: as for `grow`.

    Returns:
        expert_node: int64 [layers, logical].
        start: int64 [layers, slots], with -2 where groups span nodes and an expert has to leave its node.
    """
    from . import group_to_node

    expert_node = np.zeros(weight.shape[1:], _INT64)
    if topology.num_nodes == 1:
        return torch.from_numpy(expert_node), start
    # `current` may share memory with `start`, which is written.
    held, begin = (_array(topology.by_rank(ids, -1).flatten(1)).copy() for ids in (current, start))
    load, numbers = _array(weight), (topology.num_nodes, topology.num_ranks, topology.num_groups)
    others = (price / topology.ranks_per_node, least_price, held, begin, expert_node)
    over_layers(lambda first, last: group_to_node.choose_nodes(load, first, last, *numbers, *others), weight)
    return torch.from_numpy(expert_node), _from_ranks(begin, topology)


def shared_bounds(load: torch.Tensor, rank_slots: Sequence[int]) -> torch.Tensor:
    """A lower bound on the peak of ranks that share all experts of a load, see `lower_bounds`.

    `load` is float64 [X, experts] on any device, the result float64 [X]. `rank_slots` are the slots of each
    rank, together no fewer than experts.
    """
    from .lower_bounds import bound_rows

    bound = np.empty(len(load))
    bound_rows(_array(load.cpu()), np.array(rank_slots, _INT64), bound)
    return torch.from_numpy(bound).to(load.device)


def step_peaks(weight: torch.Tensor, physical_to_logical: torch.Tensor, topology: Topology) -> torch.Tensor:
    """The peak rank load of each snapshot and layer, float64 [snapshots, layers], in tokens.

    Of float64 [snapshots, layers, logical], tokens, and int64 [layers, slots], both on the CPU.
    """
    from . import placement_tables

    peaks = np.empty(weight.shape[:2])
    load, ids = _array(weight), _array(physical_to_logical)
    first_slot = np.array(topology.first_slots, _INT64)
    over_layers(
        lambda first, last: placement_tables.peak_loads(load, ids, first_slot, first, last, peaks),
        weight,
        _WORTH_THREADS_TO_SUM,
    )
    return torch.from_numpy(peaks)


def split_peaks(samples: torch.Tensor, physical_to_logical: torch.Tensor, topology: Topology) -> torch.Tensor:
    """The peak rank load of each sample and layer after the split of dispatch `balanced`, in fractions.

    Arguments and result as of `step_peaks`; samples are single steps, and no slot is empty.
    """
    from .split_search import peaks_after_split

    peaks = np.empty(samples.shape[:2])
    load, ids, rank_of = _array(samples), _array(physical_to_logical), _array(topology.rank_of_slot())
    over_layers(
        lambda first, last: peaks_after_split(load, ids, rank_of, topology.num_ranks, first, last, peaks),
        samples,
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
    """`forecast.expect_loads` of float64 [snapshots, layers, logical] on the CPU, tokens: the same by bin."""
    from . import forecast

    condensed = np.zeros((max(bins) + 1, *load.shape[1:]))
    array, weight, place = _array(load), np.array(weights), np.array(bins, _INT64)
    over_layers(
        lambda first, last: forecast.expect_loads(
            array, weight, place, recency, persistence, decay, first, last, condensed
        ),
        load,
        _WORTH_THREADS_TO_SUM,
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
        `new` reordered, int64 [layers, slots]. Moves, repeats in `new` and repeats in `current`, each int64
        [layers]; a repeat is a slot with another replica of its expert on the same rank.
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
    return keep_slots(physical_to_logical, physical_to_logical, topology, num_logical)[2]


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(tensor.detach().numpy())


def _from_ranks(slot_expert: np.ndarray[Any, Any], topology: Topology) -> torch.Tensor:
    """[layers, ranks * most_slots] to [layers, slots]."""
    return topology.from_ranks(torch.from_numpy(slot_expert).view(len(slot_expert), topology.num_ranks, -1))


def over_layers(
    work: Callable[[int, int], object], weight: torch.Tensor, worth_threads: int = _WORTH_THREADS
) -> None:
    """Call `work(first, last)` for chunks of the layers `first..last-1`, in any order, on a few threads.

    Numba's own threading layers do not serve. Engines start work from several threads, which workqueue does
    not allow, and they fork, which GNU OpenMP does not survive.

    Args:
        weight: [snapshots, layers, logical]; with fewer than `worth_threads` loads, one thread does it all.
    """
    num_layers = weight.shape[1]
    threads = min(_MAX_THREADS, _usable_cores(), num_layers)
    if threading.current_thread() is not threading.main_thread():
        # In the background, the engine's own thread keeps a core.
        threads = max(1, threads - 1)
    if threads == 1 or weight.numel() < worth_threads:
        work(0, num_layers)
        return
    size = -(-num_layers // (threads * _CHUNKS_PER_THREAD))
    chunks = iter([(at, min(at + size, num_layers)) for at in range(0, num_layers, size)])

    def drain() -> None:
        # Taking the next item of a list iterator is one step of the interpreter, hence thread-safe.
        for first, last in chunks:
            work(first, last)

    # One pool a call: after a later fork, a kept pool would have lost its threads.
    with ThreadPoolExecutor(threads - 1, thread_name_prefix="eplb-plan") as pool:
        others = [pool.submit(drain) for _ in range(threads - 1)]
        drain()
        for other in others:
            other.result()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
