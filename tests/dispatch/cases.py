"""The best split of a batch, by an oracle of its own; and a batch whose best split found is the even one."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linprog

import eplb_plugin as eplb


def best_peak(counts: np.ndarray, slots: np.ndarray, topology: eplb.Topology) -> float:
    """The least peak rank load of any split into fractions, by a dense linear program.

    Args:
        counts: [logical], tokens.
        slots: int64 [slots], the expert in each slot.
    """
    n, ranks = len(slots), topology.num_ranks
    of_expert = np.zeros((len(counts), n + 1))
    of_expert[slots, np.arange(n)] = 1
    of_rank = np.hstack([np.zeros((ranks, n)), -np.ones((ranks, 1))])
    for rank in range(ranks):
        of_rank[rank, :n][topology.slots_of_rank(rank)] = 1
    solved = linprog(np.eye(n + 1)[-1], of_rank, np.zeros(ranks), of_expert, counts)
    assert solved.success
    return float(solved.fun)


def worse_by_sweeps() -> tuple[torch.Tensor, eplb.Placement, eplb.Topology]:
    """Counts of one layer whose sweeps end above the even split, with an `expert_cost` of 4."""
    placement = eplb.Placement(torch.tensor([[0, 1, 0, 1, 2, 1]]), 3)
    return torch.tensor([13, 9, 8]), placement, eplb.Topology(num_ranks=3, num_slots=6)


def worse_with_two_on_a_rank() -> tuple[torch.Tensor, eplb.Placement, eplb.Topology]:
    """The same with an `expert_cost` of 8, where a rank has two replicas of expert 0."""
    placement = eplb.Placement(torch.tensor([[2, 3, 0, 0, 0, 3, 1, 3, 2]]), 4)
    return torch.tensor([50, 26, 17, 25]), placement, eplb.Topology(num_ranks=3, num_slots=9)
