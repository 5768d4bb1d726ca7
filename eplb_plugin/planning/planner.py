"""`plan`: from a load and a topology to a placement, with what it promises and what it costs."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch

from ..config import PlannerOptions
from ..errors import LoadError, PlacementError
from ..load import as_snapshots
from ..placement import Placement
from ..topology import Topology
from .backend import use_kernels
from .bounds import peak_lower_bound
from .distinct import shared_replicas, spread_over_ranks
from .exact import to_exact
from .greedy import lpt_packing
from .hierarchy import effective_topology, place_from_scratch
from .packing import pack_exact
from .recency import condense
from .search import search_placement
from .settling import settle

__all__ = ["Plan", "plan", "rebalance_experts"]

_logger = logging.getLogger(__name__)
_told_global: set[tuple[int, int, int]] = set()


@dataclass(frozen=True)
class Plan:
    """A planned placement.

    Attributes:
        placement: what to put where.
        balancedness: predicted, of the load that was planned from, mean over its snapshots.
        moves: transfers of one expert's weights to one rank that lead from `current` to the placement; 0
            when no placement in force was given.
        seconds: time that planning took.
        hierarchical: whether groups were kept within nodes; False also when the numbers did not allow it.
        shared_replicas: replicas that sit on a rank beside another of the same expert, over all layers.
    """

    placement: Placement
    balancedness: float
    moves: int
    seconds: float
    hierarchical: bool
    shared_replicas: int
    _load: torch.Tensor = field(repr=False)
    _topology: Topology = field(repr=False)

    @cached_property
    def lower_bound(self) -> torch.Tensor:
        """float64 [layers], tokens: no placement has a lower peak rank load (mean over the snapshots).

        Compare it with the peak of `rank_loads` to see how much could be gained at most. It is computed
        when it is asked for, since that takes longer than planning.
        """
        return peak_lower_bound(self._load, self._topology)


def plan(
    load: torch.Tensor,
    topology: Topology,
    current: Placement | torch.Tensor | None = None,
    options: PlannerOptions | None = None,
) -> Plan:
    """Plan a placement of every layer for a load. A pure function: same input, same plan, everywhere.

    Args:
        load: [layers, logical] or [snapshots, layers, logical] in time order, tokens; integer or float.
        topology: nodes, ranks, slots and groups.
        current: the placement in force, as a Placement or its int64 [layers, slots]; experts that stay on
            a rank keep their slot.
        options: policy, effort and seed.

    Returns:
        The plan, its tensors on the device of `load`.

    Raises:
        LoadError: a malformed load. TopologyError: more experts than slots. PlacementError: `current` does
        not fit the load or the topology.
    """
    started = time.perf_counter()
    options = options or PlannerOptions()
    snapshots = as_snapshots(load)
    num_logical = snapshots.shape[2]
    topology.check_experts(num_logical)
    in_force = _check_current(current, snapshots, topology)
    usable = effective_topology(topology, num_logical)
    _tell_global(topology, num_logical)

    current_ids = None if in_force is None else in_force.physical_to_logical
    if options.policy == "greedy":
        ids = _greedy(snapshots, usable)
    else:
        ids = _ensemble(snapshots, usable, options, current_ids)
    settled = settle(snapshots, ids, current_ids, usable, options.min_gain)
    return Plan(
        placement=Placement(settled.physical_to_logical, num_logical),
        balancedness=settled.balancedness,
        moves=settled.moves,
        seconds=time.perf_counter() - started,
        hierarchical=topology.is_hierarchical(num_logical),
        shared_replicas=settled.shared_replicas,
        _load=snapshots,
        _topology=usable,
    )


def rebalance_experts(
    weight: torch.Tensor,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    current: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The function of that name that engines call, answered by `plan` with default options.

    Args:
        weight: [layers, logical] or [snapshots, layers, logical], tokens.
        num_replicas: slots over all ranks.
        num_groups: groups of experts per layer.
        num_nodes: nodes.
        num_gpus: ranks.
        current: int64 [layers, slots], the placement in force, or None.

    Returns:
        physical_to_logical: int64 [layers, slots].
        logical_to_physical: int64 [layers, logical, max_replicas], padded with -1.
        replica_count: int64 [layers, logical].

    Raises:
        As `plan`, and TopologyError where ranks or slots do not divide evenly.
    """
    topology = Topology(
        num_nodes=num_nodes, num_ranks=num_gpus, num_slots=num_replicas, num_groups=num_groups
    )
    placement = plan(weight, topology, current).placement
    return placement.physical_to_logical, placement.logical_to_physical, placement.replica_count


def _greedy(load: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Greedy replication and LPT with capacity on the summed load: the algorithm of engines today."""
    return place_from_scratch(
        load.sum(0, keepdim=True), topology, lambda w, packs: lpt_packing(w.sum(0), packs), False
    )


def _ensemble(
    load: torch.Tensor, topology: Topology, options: PlannerOptions, current: torch.Tensor | None
) -> torch.Tensor:
    weighted = condense(load, options.snapshot_decay)
    if use_kernels(load, options, current is not None):
        on_host = None if current is None else current.cpu()
        ids = search_placement(weighted.cpu(), topology, options, on_host).to(load.device)
    else:
        ids = place_from_scratch(to_exact(weighted), topology, partial(_pack, options=options))
    if bool(shared_replicas(ids, topology).any()):
        count = Placement(ids, load.shape[2]).replica_count
        ids = spread_over_ranks(ids, to_exact(weighted) / count, topology)
    return ids


def _pack(weight: torch.Tensor, num_packs: int, options: PlannerOptions) -> tuple[torch.Tensor, torch.Tensor]:
    return pack_exact(to_exact(weight), num_packs, options)


def _check_current(
    current: Placement | torch.Tensor | None, load: torch.Tensor, topology: Topology
) -> Placement | None:
    if current is None:
        return None
    if not isinstance(current, Placement):
        current = Placement(current, load.shape[2])
    if (current.num_layers, current.num_logical) != tuple(load.shape[1:]):
        raise LoadError(
            f"load has {load.shape[1]} layers of {load.shape[2]} experts, "
            f"the placement in force {current.num_layers} of {current.num_logical}"
        )
    if current.num_slots != topology.num_slots:
        raise PlacementError(
            f"the placement in force has {current.num_slots} slots, the topology {topology.num_slots}"
        )
    return current.to(load.device)


def _tell_global(topology: Topology, num_logical: int) -> None:
    """Say once per combination that the hierarchical policy does not fit."""
    key = (topology.num_nodes, topology.num_groups, num_logical)
    if topology.is_hierarchical(num_logical) or key in _told_global:
        return
    _told_global.add(key)
    level = logging.WARNING if topology.num_groups > 1 else logging.INFO
    _logger.log(level, "planning globally: num_nodes=%d, num_groups=%d and %d experts do not divide", *key)
