"""Match the ranks of a new placement to those in force, for the most overlap."""

from __future__ import annotations

import numpy as np
import torch

from ...core.topology import Topology

__all__ = ["match_ranks"]


def match_ranks(physical_to_logical: torch.Tensor, current: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Exchange whole ranks within nodes, then whole nodes, for the fewest moves from `current`.

    Ranks of a node with equal slots are interchangeable, and so are nodes: no peak changes. Both are
    assignment problems, solved exactly (Jonker and Volgenant, in scipy).

    Args:
        physical_to_logical: int64 [layers, slots] on the CPU, the new placement.
        current: int64 [layers, slots] on the CPU, the placement in force, -1 for an empty slot.
        topology: nodes, ranks and slots.

    Returns:
        int64 [layers, slots].
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
