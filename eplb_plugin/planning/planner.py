"""`plan`: from a load and a topology to a placement, with what it promises and what it costs."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from ..config.options import PlannerOptions
from ..core.errors import ConfigError, LoadError, PlacementError, TopologyError
from ..core.load import check_values, to_snapshots
from ..core.placement import Placement, checked_ids
from ..core.topology import Topology
from .active_ranks import Living, living_part
from .adaptive.search import search_placement
from .anti_affinity import part_repeats
from .backend import use_kernels
from .elastic import complete, missing_experts
from .forecast import expected_load
from .hierarchy import effective_topology
from .lower_bounds import peak_lower_bound
from .skip_rule import settle
from .tensors.from_scratch import place_by_ensemble, place_greedily
from .tensors.single_look import plan_with_one_look

__all__ = ["Plan", "plan", "rebalance_experts"]

_logger = logging.getLogger(__name__)
_told_global: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()


@dataclass(frozen=True)
class Plan:
    """A planned placement.

    Attributes:
        placement: what to put where; the slots of dead ranks are empty (-1).
        balancedness: predicted, of the load that was planned from, mean over its snapshots; of living ranks.
        moves: transfers of one expert's weights to one rank that lead from `current` to the placement; 0
            when no placement in force was given.
        seconds: time that planning took.
        hierarchical: whether groups were kept within nodes; False also when the numbers did not allow it.
        shared_replicas: replicas that sit on a rank beside another of the same expert, over all layers.
        lost: (layer, expert) pairs, in rising order, that no living rank holds in `current`. They have slots
            in the placement, but their weights have to come from the checkpoint; all else has a source.
    """

    placement: Placement
    balancedness: float
    moves: int
    seconds: float
    hierarchical: bool
    shared_replicas: int
    lost: tuple[tuple[int, int], ...]
    _load: torch.Tensor = field(repr=False)
    _topology: Topology = field(repr=False)

    @cached_property
    def lower_bound(self) -> torch.Tensor:
        """float64 [layers], tokens: no placement has a lower peak rank load (mean over the snapshots) on the
        living ranks.

        Compare it with the peak of `rank_loads` to see how much could be gained at most. It is computed
        when it is asked for, since that takes longer than planning.
        """
        return peak_lower_bound(self._load, self._topology)


def plan(
    load: torch.Tensor,
    topology: Topology,
    current: Placement | torch.Tensor | None = None,
    options: PlannerOptions | None = None,
    *,
    active_ranks: Sequence[bool] | torch.Tensor | None = None,
) -> Plan:
    """Plan a placement of every layer for a load. A pure function: same input, same plan, everywhere.

    Args:
        load: [layers, logical] or [snapshots, layers, logical] in time order, tokens; integer or float.
        topology: nodes, ranks, slots and groups.
        current: the placement in force, as a Placement or its int64 [layers, slots]; experts that stay on
            a rank keep their slot. Slots may be empty (-1), those of a rank that has just joined, say; with
            those or with `active_ranks` the tensor may also lack experts, see `Plan.lost`. The policy
            `greedy` and the objective `spread` plan from scratch all the same, and know no `move_price`.
        options: policy, effort and seed.
        active_ranks: bool [ranks], which ranks are alive; None is all of them. The slots of the others are
            left empty, and what `current` has there is gone.

    Returns:
        The plan, its tensors on the device of `load`.

    Raises:
        LoadError: a malformed load. TopologyError: more experts than living slots, a malformed mask, or the
        objective `spread` where ranks differ in slots. PlacementError: `current` does not fit the load or the
        topology.
    """
    started = time.perf_counter()
    if not isinstance(topology, Topology):
        raise TopologyError(f"topology is a {type(topology).__name__}, not a Topology")
    if options is not None and not isinstance(options, PlannerOptions):
        raise ConfigError(f"options are a {type(options).__name__}, not PlannerOptions")
    options = options or PlannerOptions()
    snapshots = to_snapshots(load)
    num_logical = snapshots.shape[2]
    living = living_part(topology, active_ranks, num_logical)
    usable = effective_topology(living.topology, num_logical)
    hierarchical = usable.num_nodes == topology.num_nodes and living.topology.is_hierarchical(num_logical)
    if not hierarchical:
        _tell_global(topology, living, num_logical)
    if options.objective == "spread" and not usable.is_even:
        raise TopologyError(f"objective='spread' plans ranks with equal slots only, not {usable.rank_slots}")

    lost: tuple[tuple[int, int], ...] = ()
    if current is None and _by_tensors(snapshots, usable, options):
        placement, settled = plan_with_one_look(snapshots, usable, living, options)
    else:
        check_values(snapshots)
        current_ids = _check_current(current, snapshots, topology, active_ranks is not None)
        start = None
        expected = expected_load(snapshots, options.snapshot_decay, options.persistence)
        if current_ids is not None:
            current_ids = living.compact(current_ids)
            lost = missing_experts(current_ids, num_logical)
            if lost or bool((current_ids < 0).any()):
                start = complete(current_ids.cpu(), expected.cpu(), usable).to(snapshots.device)
        ids = _placed(snapshots, expected, usable, options, current_ids, start)
        settled = settle(snapshots, expected, ids, current_ids, usable, options.min_gain, start)
        placement = Placement(living.expand(settled.physical_to_logical), num_logical)
    return Plan(
        placement=placement,
        balancedness=settled.balancedness,
        moves=settled.moves,
        seconds=time.perf_counter() - started,
        hierarchical=hierarchical,
        shared_replicas=settled.shared_replicas,
        lost=lost,
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


def _by_tensors(
    load: torch.Tensor, topology: Topology, options: PlannerOptions, has_current: bool = False
) -> bool:
    """Whether a plan is made by tensor operations, on the device of the load."""
    if options.policy == "greedy":
        return True
    # The ensemble on tensors packs ranks with equal slots only.
    return topology.is_even and not use_kernels(load, options, has_current)


def _placed(
    load: torch.Tensor,
    expected: torch.Tensor,
    topology: Topology,
    options: PlannerOptions,
    current: torch.Tensor | None,
    start: torch.Tensor | None,
) -> torch.Tensor:
    """int64 [layers, slots], a placement by the policy of `options`."""
    if options.policy == "greedy":
        return place_greedily(load, topology)
    if _by_tensors(load, topology, options, current is not None):
        return place_by_ensemble(expected, topology, options)
    cpu_load = expected.cpu()
    held, begin = (None if x is None else x.cpu() for x in (current, start))
    ids = search_placement(cpu_load, topology, options, held, begin)
    return part_repeats(ids, cpu_load, topology, held, options.max_moves).to(load.device)


def _check_current(
    current: Placement | torch.Tensor | None, load: torch.Tensor, topology: Topology, elastic: bool
) -> torch.Tensor | None:
    """`current` as int64 [layers, slots] on the device of `load`; experts may be missing where it has empty
    slots or where `elastic`."""
    if current is None:
        return None
    num_layers, num_logical = load.shape[1:]
    if isinstance(current, Placement):
        ids, experts = current.physical_to_logical, current.num_logical
    else:
        ids, experts = checked_ids(current, num_logical), num_logical
        if not elastic and not bool((ids < 0).any()):
            Placement(ids, num_logical)
    if (ids.shape[0], experts) != (num_layers, num_logical):
        raise LoadError(
            f"load has {num_layers} layers of {num_logical} experts, "
            f"the placement in force {ids.shape[0]} of {experts}"
        )
    if ids.shape[1] != topology.num_slots:
        raise PlacementError(
            f"the placement in force has {ids.shape[1]} slots, the topology {topology.num_slots}"
        )
    return ids.to(load.device)


def _tell_global(topology: Topology, living: Living, num_logical: int) -> None:
    """Say once per combination that the hierarchical policy does not fit."""
    numbers = (topology.num_nodes, topology.num_groups, num_logical)
    divides = topology.num_groups % topology.num_nodes == 0 and num_logical % topology.num_groups == 0
    key = (numbers, living.rank_slots if divides else ())
    if key in _told_global:
        return
    _told_global.add(key)
    if divides:
        _logger.warning(
            "planning globally: the %d nodes differ in the slots of their living ranks: %s",
            topology.num_nodes,
            living.rank_slots,
        )
        return
    level = logging.WARNING if topology.num_groups > 1 else logging.INFO
    _logger.log(
        level, "planning globally: num_nodes=%d, num_groups=%d and %d experts do not divide", *numbers
    )
