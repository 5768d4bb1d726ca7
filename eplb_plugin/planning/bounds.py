"""What no placement can beat: lower bounds on the peak rank load."""

from __future__ import annotations

import torch

from ..topology import Topology

__all__ = ["peak_lower_bound"]


def peak_lower_bound(load: torch.Tensor, topology: Topology) -> torch.Tensor:
    """A lower bound on the peak rank load of every layer, mean over the snapshots.

    Per snapshot the larger of the mean rank load and the load per replica that no choice of replica counts
    can avoid: the k-th largest of all w / count shares bounds it when slots run out.

    Args:
        load: float64 [snapshots, layers, logical], tokens.
        topology: as from `effective_topology`.

    Returns:
        float64 [layers], tokens.
    """
    mean = load.sum(2) / topology.num_ranks
    hottest = load.amax(2) / (topology.num_slots - load.shape[2] + 1)
    return torch.maximum(mean, hottest).mean(0)
