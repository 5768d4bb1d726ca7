"""`plan`: the frame around every policy, from a load and a topology to a checked, measured placement."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from ..config.options import PlannerOptions
from ..core.balancedness import balancedness_of_peaks
from ..core.errors import ConfigError, LoadError, PlacementError, TopologyError
from ..core.load import as_snapshots, sum_over_last
from ..core.placement import Placement, checked_ids
from ..core.topology import Topology
from .balanced_dispatch import expected_samples, improve_for_dispatch
from .elastic import ActivePart, active_part, complete_placement, missing_experts
from .forecast import expected_load
from .hierarchy import effective_topology
from .kernels.api import count_shared, split_peaks, step_peaks
from .lower_bounds import peak_lower_bound
from .policies import policy_for
from .skip_rule import Peaks, apply_skip_rule

__all__ = ["Plan", "plan", "rebalance_experts", "warmup"]

_logger = logging.getLogger(__name__)
_warned: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()


@dataclass(frozen=True)
class Plan:
    """A planned placement.

    Attributes:
        placement: on the device of the load; the slots of dead ranks are empty (-1).
        moves: transfers of one expert's weights to one rank, from `current` to the placement; 0 without
            `current`.
        seconds: planning time.
        hierarchical: whether groups were kept within nodes; False where the numbers do not allow it.
        shared_replicas: replicas on a rank beside another of the same expert, over all layers.
        lost: (layer, expert) pairs, in rising order, that no living rank holds in `current`. The placement
            has slots for them, but their weights have to come from the checkpoint.
    """

    placement: Placement
    moves: int
    seconds: float
    hierarchical: bool
    shared_replicas: int
    lost: tuple[tuple[int, int], ...]
    _ids: torch.Tensor = field(repr=False)
    _load: torch.Tensor = field(repr=False)
    _topology: Topology = field(repr=False)
    _peaks: Peaks = field(repr=False)

    @cached_property
    def balancedness(self) -> float:
        """Predicted for the given load, mean over its snapshots, of living ranks.

        After the split with `dispatch="balanced"`. It is computed on first use.
        """
        mean = sum_over_last(self._load) / self._topology.num_ranks
        return balancedness_of_peaks(mean, self._peaks(self._load, self._ids, self._topology))

    @cached_property
    def lower_bound(self) -> torch.Tensor:
        """float64 [layers], tokens: no placement on the living ranks has a lower peak rank load.

        A mean over the snapshots. A peak of 102 with a bound of 100 is at most 2 % above the optimum. It is
        computed on first use, which takes longer than planning.
        """
        return peak_lower_bound(self._load, self._topology, even=self._peaks is step_peaks).to(
            self.placement.device
        )


def plan(
    load: torch.Tensor,
    topology: Topology,
    current: Placement | torch.Tensor | None = None,
    options: PlannerOptions | None = None,
    *,
    samples: torch.Tensor | None = None,
    active_ranks: Sequence[bool] | torch.Tensor | None = None,
) -> Plan:
    """Plan a placement of every layer for a load. A pure function: same input, same plan, everywhere.

    Args:
        load: [layers, logical] or [snapshots, layers, logical] in time order, tokens; integer or float, on
            any device.
        topology: nodes, ranks, slots and groups.
        current: the placement in force, as a Placement or its int64 [layers, slots]. Experts that stay on a
            rank keep their slot. Slots may be empty (-1), as on a rank that has just joined; the tensor may
            then also lack experts, as with `active_ranks`: see `Plan.lost`.
        options: policy and its options.
        samples: [steps, layers, logical], tokens of single steps of the same time, for plans with
            `options.dispatch="balanced"`. None, or no step: `load` stands for them.
        active_ranks: bool [ranks], True for living ranks; None: all are alive. Dead ranks get empty slots,
            and `current` is ignored there.

    Raises:
        LoadError: a malformed load, or samples that do not fit it. TopologyError: more experts than living
        slots, a malformed mask, or a topology that the policy cannot plan. PlacementError: `current` does not
        fit the load or the topology. ConfigError: an unknown policy, or a bound that it cannot keep.
    """
    started = time.perf_counter()
    if not isinstance(topology, Topology):
        raise TopologyError(f"topology is a {type(topology).__name__}, not a Topology")
    if options is not None and not isinstance(options, PlannerOptions):
        raise ConfigError(f"options are a {type(options).__name__}, not PlannerOptions")
    options = options or PlannerOptions()
    policy = policy_for(options)
    snapshots = as_snapshots(load).cpu()
    num_logical = snapshots.shape[2]
    active = active_part(topology, active_ranks, num_logical)
    usable = effective_topology(active.topology, num_logical)
    hierarchical = usable.num_nodes == topology.num_nodes and active.topology.is_hierarchical(num_logical)
    if not hierarchical:
        _warn_of_global_plan(topology, active, num_logical)

    balanced = options.dispatch == "balanced"
    checked = None if samples is None else _checked_samples(samples, snapshots)
    measured = snapshots if checked is None else checked
    peaks = split_peaks if balanced else step_peaks
    expected = expected_load(snapshots, options.snapshot_decay, options.persistence)
    in_force: Placement | None = None
    lost: tuple[tuple[int, int], ...] = ()
    if current is not None:
        held = active.compact(_checked_current(current, snapshots, topology, active_ranks is not None))
        lost = missing_experts(held, num_logical)
        in_force = complete_placement(held, num_logical, expected, usable)
    placed = policy(expected.to(load.device), usable, in_force)
    ids = _checked_result(placed, options.policy, snapshots, usable)
    if balanced:
        expected = expected_samples(measured, expected)
    if balanced and options.policy == "adaptive":
        ids = improve_for_dispatch(expected, usable, ids, in_force, options)
    if in_force is None:
        moves, shared = 0, int(count_shared(ids, usable, num_logical).sum())
    else:
        ids, moves, shared = apply_skip_rule(expected, ids, in_force, usable, options.min_gain, peaks)
    return Plan(
        placement=Placement(active.expand(ids).to(load.device), num_logical),
        moves=moves,
        seconds=time.perf_counter() - started,
        hierarchical=hierarchical,
        shared_replicas=shared,
        lost=lost,
        _ids=ids,
        _load=measured,
        _topology=usable,
        _peaks=peaks,
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
    """The function of that name that engines call, by `plan` with default options.

    Args:
        weight: [layers, logical] or [snapshots, layers, logical], tokens.
        num_replicas: slots over all ranks.
        num_groups: groups of experts per layer.
        num_nodes, num_gpus: nodes and ranks.
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


def warmup(topology: Topology | None = None, *, dispatch: str | None = None) -> None:
    """Compile whatever the first plan would compile, or load it from the cache on disk.

    Compiling takes 30 to 90 seconds, once for each version and location of the package. Loading takes about
    one second.

    Args:
        topology: planned for as well, so that everything its plans need is loaded; None plans for a small
            topology of several nodes alone.
        dispatch: that plans expect; `balanced` compiles the search for it too.
    """
    small = Topology(num_nodes=2, num_ranks=4, num_slots=12, num_groups=2)
    for each in (small,) if topology is None else (small, topology):
        num_logical = each.num_groups * max(1, each.num_slots // (2 * each.num_groups))
        num_logical = min(num_logical, each.num_slots)
        load = torch.arange(1, num_logical + 1, dtype=torch.float64).expand(2, 1, -1)
        current = Placement.default(1, num_logical, each.num_slots)
        _ = plan(load, each).lower_bound
        plan(load, each, current)
        # With free moves, a plan from scratch is matched to the placement in force, which imports scipy.
        plan(load, each, current, PlannerOptions(move_price=0))
        if dispatch == "balanced":
            plan(load, each, current, PlannerOptions(dispatch="balanced"))


def _checked_current(
    current: Placement | torch.Tensor, load: torch.Tensor, topology: Topology, elastic: bool
) -> torch.Tensor:
    """`current` as int64 [layers, slots] on the CPU. It may lack experts if it has empty slots, or if
    `elastic`."""
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
    return ids.cpu()


def _checked_samples(samples: torch.Tensor, snapshots: torch.Tensor) -> torch.Tensor | None:
    """`samples` as float64 [steps, layers, logical] on the CPU; None without any step."""
    if isinstance(samples, torch.Tensor) and samples.shape == (0, *snapshots.shape[1:]):
        return None
    steps = as_snapshots(samples, "samples").cpu()
    if steps.shape[1:] != snapshots.shape[1:]:
        raise LoadError(
            f"samples have {steps.shape[1]} layers of {steps.shape[2]} experts, "
            f"the load {snapshots.shape[1]} of {snapshots.shape[2]}"
        )
    return steps


def _checked_result(
    placement: Placement, policy: str, load: torch.Tensor, topology: Topology
) -> torch.Tensor:
    """The placement of a policy as int64 [layers, slots] on the CPU."""
    wanted = (*load.shape[1:], topology.num_slots)
    if (placement.num_layers, placement.num_logical, placement.num_slots) != wanted:
        raise PlacementError(
            f"policy {policy!r} returned {placement}, not {wanted[0]} layers, {wanted[1]} experts in "
            f"{wanted[2]} slots"
        )
    if placement.has_empty_slots:
        raise PlacementError(f"policy {policy!r} left slots empty")
    return placement.physical_to_logical.cpu()


def _warn_of_global_plan(topology: Topology, active: ActivePart, num_logical: int) -> None:
    """Log once for each combination of numbers that the hierarchical policy does not fit."""
    numbers = (topology.num_nodes, topology.num_groups, num_logical)
    divides = topology.num_groups % topology.num_nodes == 0 and num_logical % topology.num_groups == 0
    key = (numbers, active.rank_slots if divides else ())
    if key in _warned:
        return
    _warned.add(key)
    if divides:
        _logger.warning(
            "planning globally: the %d nodes differ in the slots of their living ranks: %s",
            topology.num_nodes,
            active.rank_slots,
        )
        return
    level = logging.WARNING if topology.num_groups > 1 else logging.INFO
    _logger.log(
        level, "planning globally: num_nodes=%d, num_groups=%d and %d experts do not divide", *numbers
    )
