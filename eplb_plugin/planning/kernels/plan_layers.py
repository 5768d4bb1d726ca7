"""The entry point of the compiled search: plans of several layers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .compiling import SOURCES, copy_into, entry_point
from .replica_counts import VACANT
from .single_load_plan import plan_single_load
from .snapshot_search import plan_snapshots

__all__ = ["Problem", "plan_layers"]


class Problem(NamedTuple):
    """Layers to plan, and the effort for them.

    Where ranks differ in slots, each is given as many as the largest has: the last slots of the others are
    closed and hold -1.
    """

    weight: np.ndarray  # float64 [snapshots, layers, logical], tokens times the weight of their snapshot
    # int64 [layers, logical], node of each expert; from a start, the node it may be moved to
    expert_node: np.ndarray
    # int64 [layers, slots], the placement in force, -1 for an empty slot; moves are counted from it
    current: np.ndarray
    # int64 [layers, slots], the placement to start from, -2 for a slot to be filled; [layers, 0] to plan from
    # scratch
    start: np.ndarray
    rank_slots: np.ndarray  # int64 [ranks], open slots of each rank
    ranks_per_node: int  # ranks of each node
    price: float  # of one move, as a fraction of the mean rank load; 0 from scratch
    least_price: float  # least factor on the price, where traffic is steady; 1: the price as it is
    max_moves: int  # most moves of a layer away from `current`
    rounds: int  # most rounds of improvement of a candidate
    candidates: int  # most candidates of a layer from scratch
    patience: int  # candidates in a row that may fail to beat the best
    tolerance: float  # the search ends within this fraction of the mean rank load above the lower bound
    seed: int  # of the noise in all candidates but the first


def _build(sources):
    @entry_point
    def plan_layers(problem, first, last, slot_expert):
        """Plan layers `first..last-1` of a `Problem`, writing `slot_expert`, int64 [layers, slots].

        Loads are scaled to float32 with a mean rank load of 1, summed over snapshots.
        """
        _ = sources  # numba adds values of the closure to the key of the cache
        weight, start, num_ranks = problem.weight, problem.start, problem.rank_slots.shape[0]
        num_snapshots, _, num_logical = weight.shape
        scaled = np.empty((num_snapshots, num_logical), np.float32)
        for layer in range(first, last):
            total = 0.0
            for snapshot in range(num_snapshots):
                for expert in range(num_logical):
                    total += weight[snapshot, layer, expert]
            if total <= 0.0:
                if start.shape[1] and start[layer].min() != VACANT:
                    copy_into(slot_expert[layer], start[layer])
                    continue
                # Without load, replicas still belong on different ranks: plan for equal loads.
                scaled[:] = np.float32(num_ranks / (num_snapshots * num_logical))
            else:
                # The quotient overflows for tiny loads: a power of two makes them larger first.
                larger = 1.0 if num_ranks / total < np.inf else 2.0**100
                scale = num_ranks / (total * larger)
                for snapshot in range(num_snapshots):
                    for expert in range(num_logical):
                        scaled[snapshot, expert] = np.float32(
                            weight[snapshot, layer, expert] * larger * scale
                        )
            if num_snapshots == 1 and start.shape[1] == 0:
                plan_single_load(problem, layer, scaled[0], slot_expert[layer])
            else:
                plan_snapshots(problem, layer, scaled, slot_expert[layer])

    return plan_layers


plan_layers = _build(SOURCES)
