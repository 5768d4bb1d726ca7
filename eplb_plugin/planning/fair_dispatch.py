"""Plans for a fair table: very hot experts, whose ranks cannot be shared out evenly, get even rank loads."""

from __future__ import annotations

import torch

from ..config.options import PlannerOptions
from ..core.placement import Placement
from ..core.topology import Topology
from ..dispatch.fair_table import FairTable, checked_inputs, fair_table
from .hierarchy import effective_topology

__all__ = ["plan_fair_table"]

_TOLERANCE = 0.01  # of the peak of the even split: what a table may cost before slots are swapped for it


def plan_fair_table(
    load: torch.Tensor,
    topology: Topology,
    planned: Placement,
    in_force: Placement | None,
    options: PlannerOptions,
) -> FairTable:
    """The fair table for a plan for the even split; slots are swapped where the table costs over 1 %.

    Example: an expert with a fourth of all tokens has 13 replicas on 16 ranks. Three of them serve two ranks,
    so they get twice the tokens of the others. Lighter experts make room there.

    Args:
        load: [layers, logical], tokens that are expected.
        planned: for the even split.
        in_force: what moves are counted from; None: no placement is, and moves are free. A layer with swaps
            keeps it where they gain too little.
        options: with `move_price` and `min_gain`.

    Returns:
        The table, with the placement to go to.

    Raises:
        As `fair_table`.
    """
    ids, load = checked_inputs(planned, topology, load)
    from ..dispatch.fair_kernels import level_sources

    usable = effective_topology(topology, planned.num_logical)
    # Groups stay within their nodes. A bound on moves is kept by the plan, without swaps on top.
    width = 0 if options.max_moves is not None else topology.num_ranks // usable.num_nodes
    held = ids.clone() if in_force is None else in_force.physical_to_logical
    price = 0.0 if in_force is None else options.known_price
    swapped = torch.zeros(len(ids), dtype=torch.bool)
    arguments = topology.num_ranks, width, held.numpy(), price, _TOLERANCE, swapped.numpy()
    sources = torch.from_numpy(level_sources(ids.numpy(), load.numpy(), *arguments))
    made = FairTable(Placement(ids, planned.num_logical), sources, topology)
    if in_force is None or not bool(swapped.any()):
        return made
    kept = fair_table(in_force, topology, load)
    peaks = [_peaks(load, table) for table in (kept, made)]
    mean = load.sum(1) / topology.num_ranks
    gain = torch.where(mean > 0, mean / peaks[1] - mean / peaks[0], 0.0)
    stays = swapped & (gain < options.min_gain)
    placement = made.placement.with_layers(stays, in_force)
    return FairTable(placement, torch.where(stays[:, None], kept.sources, sources), topology)


def _peaks(load: torch.Tensor, table: FairTable) -> torch.Tensor:
    tokens = load.gather(1, table.placement.physical_to_logical) * table.shares
    return table.topology.by_rank(tokens, 0.0).sum(2).amax(1)
