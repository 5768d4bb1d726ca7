"""The entrance of the compiled search: plans of several layers.

Loads are float32 within, scaled so that the mean rank load, summed over snapshots, is 1. Where ranks
differ in slots, all are given as many as the largest; what a rank does not have is closed, and holds -1.
"""

from __future__ import annotations

import numpy as np

from .compiling import SOURCES, compile_entrance
from .copying import _copy
from .layer import _plan_layer
from .limits import _VACANT
from .single_load import _plan_single

__all__ = ["plan_layers"]


def _entrance(sources):
    @compile_entrance
    def plan_layers(
        weight, first, last, num_ranks, ranks_per_node, room, expert_node, current, start, price, max_moves,
        rounds, candidates, patience, tolerance, seed, result,
    ):  # fmt: skip
        """Plan layers `first..last-1`, writing `result`.

        Args:
            weight: float64 [snapshots, layers, logical], tokens times the weight of their snapshot.
            num_ranks, ranks_per_node: the topology.
            room: int64 [ranks], open slots of each rank; the others of a rank come last.
            expert_node: int64 [layers, logical], the node that each expert belongs to, or might be moved to.
            current: int64 [layers, slots], what is held now, -1 for an empty slot: moves are counted from it.
            start: int64 [layers, slots], the placement to grow from, or [layers, 0] to start from scratch;
                -2 for a slot that has to be filled.
            price: what a move costs, as a share of the mean rank load.
            max_moves: most moves per layer away from `current`.
            rounds: most rounds of improvement per candidate.
            candidates: most candidates per layer from scratch.
            patience: candidates in a row that may fail to improve on the best.
            tolerance: stop within this share of the mean rank load above the lower bound.
            seed: of the candidates' noise.
            result: int64 [layers, slots], written.
        """
        _ = sources  # what is closed over belongs to the key of the cache
        num_snapshots, _, num_logical = weight.shape
        scaled = np.empty((num_snapshots, num_logical), np.float32)
        for layer in range(first, last):
            total = 0.0
            for snapshot in range(num_snapshots):
                for expert in range(num_logical):
                    total += weight[snapshot, layer, expert]
            if total <= 0.0:
                if start.shape[1] and start[layer].min() != _VACANT:
                    _copy(start[layer], result[layer])
                    continue
                # Nothing to balance, but replicas still belong on distinct ranks: plan for even loads.
                scaled[:] = np.float32(num_ranks / (num_snapshots * num_logical))
            else:
                # Loads so small that this overflows are made larger first, by a power of two.
                larger = 1.0 if num_ranks / total < np.inf else 2.0**100
                scale = num_ranks / (total * larger)
                for snapshot in range(num_snapshots):
                    for expert in range(num_logical):
                        scaled[snapshot, expert] = np.float32(
                            weight[snapshot, layer, expert] * larger * scale
                        )
            if num_snapshots == 1 and start.shape[1] == 0:
                _plan_single(
                    scaled[0], expert_node[layer], num_ranks, ranks_per_node, room, rounds, candidates,
                    patience, tolerance, seed, result[layer],
                )  # fmt: skip
                continue
            _plan_layer(
                scaled, expert_node[layer], current[layer], start[layer], num_ranks, ranks_per_node, room,
                price, max_moves, rounds, candidates, patience, tolerance, seed, result[layer],
            )  # fmt: skip

    return plan_layers


plan_layers = _entrance(SOURCES)
