"""A layer for the kernels that plan a single load."""

from __future__ import annotations

import numpy as np

from eplb_plugin.planning.kernels.plan_layers import Problem


def problem_of(load: np.ndarray, room: np.ndarray) -> Problem:
    """A layer of one node from scratch, as `plan_from_scratch` makes it."""
    none = np.empty((1, 0), np.int64)
    return Problem(
        weight=load[None, None].astype(np.float64),
        expert_node=np.zeros((1, len(load)), np.int64),
        current=none,
        start=none,
        rank_slots=room,
        ranks_per_node=len(room),
        price=0.0,
        least_price=1.0,
        max_moves=0,
        rounds=200,
        candidates=4,
        patience=1,
        tolerance=5e-4,
        seed=0,
    )
