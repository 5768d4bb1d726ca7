"""The best split of batches over replicas, in fractions of tokens, by a linear program.

It is the measure for `balance_batch`, which splits whole tokens in microseconds. A step takes milliseconds.
"""

from __future__ import annotations

import numpy as np
import torch

from ..core.errors import EplbError
from ..core.placement import Placement
from ..core.topology import Topology

__all__ = ["best_split"]


def best_split(counts: torch.Tensor, placement: Placement, topology: Topology) -> torch.Tensor:
    """The split with the lowest load of the fullest rank, for each step and layer.

    One linear program a step, solved by HiGHS: its layers share no variable, so each gets its own optimum.
    Experts with one replica are constants. Of several best splits, the solver's first vertex is taken.

    Args:
        counts: [steps, layers, logical], tokens of each expert, of single steps.
        placement: of those layers and experts.
        topology: its ranks and slots.

    Returns:
        float64 [steps, layers, slots], tokens. Over the slots of an expert they add up to its count.

    Raises:
        EplbError: the solver failed.
    """
    # scipy is slow to import.
    from scipy import sparse
    from scipy.optimize import linprog

    placement.validate(topology)
    ids = placement.physical_to_logical.cpu().numpy()
    replicas = placement.replica_count.cpu().numpy()
    (layers, slots), ranks = ids.shape, topology.num_ranks
    rank_of_slot = topology.rank_of_slot().numpy()
    # Row of each slot in the bounds: its rank within its layer.
    bound = np.arange(layers)[:, None] * ranks + rank_of_slot
    is_open = (ids >= 0) & (np.take_along_axis(replicas, ids.clip(0), 1) > 1)
    expert = (np.arange(layers)[:, None] * placement.num_logical + ids)[is_open]
    named, row = np.unique(expert, return_inverse=True)
    columns, width = np.arange(len(expert)), len(expert) + layers
    # Behind the open slots stands the peak of each layer.
    peaks = len(expert) + np.arange(layers)
    per_rank = sparse.csc_matrix(
        (
            np.concatenate([np.ones(len(expert)), -np.ones(layers * ranks)]),
            (
                np.concatenate([bound[is_open], np.arange(layers * ranks)]),
                np.concatenate([columns, peaks.repeat(ranks)]),
            ),
        ),
        shape=(layers * ranks, width),
    )
    per_expert = sparse.csc_matrix((np.ones(len(expert)), (row, columns)), shape=(len(named), width))
    objective = np.zeros(width)
    objective[peaks] = 1

    split = np.zeros((counts.shape[0], layers, slots))
    for step, given in enumerate(counts.cpu().numpy().astype(np.float64)):
        # The solver's tolerances are absolute: a mean rank load becomes 1.
        unit = given.sum(1, keepdims=True) / ranks
        unit[unit == 0] = 1
        shares = given / unit
        tokens = np.where(ids >= 0, np.take_along_axis(shares, ids.clip(0), 1), 0.0)
        fixed = np.bincount(bound.ravel(), np.where(is_open, 0.0, tokens).ravel(), layers * ranks)
        if len(expert):
            solved = linprog(objective, per_rank, -fixed, per_expert, shares.ravel()[named], method="highs")
            if not solved.success:
                raise EplbError(f"the linear program of step {step} was not solved: {solved.message}")
            tokens[is_open] = solved.x[: len(expert)].clip(0)
        split[step] = tokens * unit
    return torch.from_numpy(split)
