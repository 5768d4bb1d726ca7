"""How a loop starts: checks, agreement, and experts brought to where the first placement wants them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..config.options import PlannerOptions, RebalancerOptions
from ..core.errors import LoadError, PlacementError, TopologyError, TransferError
from ..core.load import as_snapshots
from ..core.placement import Placement
from ..core.topology import Topology
from ..dispatch.tables import DispatchTables
from ..planning.elastic import complete, missing_experts
from ..planning.hierarchy import effective_topology
from .connections import Channels
from .context import Parts
from .control.rank_group import fingerprint
from .control.scheduling import AtOnce
from .load_window import LoadWindow
from .relocation import Move
from .verify.fingerprints import ExpertFingerprints
from .weights.expert_weights import ExpertWeights
from .weights.staging import Staging
from .weights.streams import DeviceOrder

__all__ = ["Restore", "start_up"]

Restore = Callable[[int, int, int], None]
"""restore(layer, expert, slot): write an expert's weights to a slot of this rank, counted on this rank."""

_NAMED = 5


def start_up(
    channels: Channels,
    topology: Topology,
    shape: tuple[int, int],
    *,
    weights: Sequence[Sequence[torch.Tensor]] | None,
    placement: Placement | torch.Tensor | None,
    restore: Restore | None,
    load: torch.Tensor | None,
    options: RebalancerOptions,
    planner: PlannerOptions,
    device: torch.device,
) -> Parts:
    """All ranks: what every rebalance will work with. Arguments and errors as of `Rebalancer`.

    Args:
        shape: layers, and experts of a layer.
    """
    num_layers, num_logical = shape
    control = channels.control

    def check() -> tuple[torch.Tensor, ExpertWeights]:
        if not min(topology.slots_by_rank):
            raise TopologyError(f"{topology} has ranks without slots; leave them out of the group")
        held = _check_placement(placement, num_layers, num_logical, topology)
        if weights is not None and len(weights) != num_layers:
            raise TransferError(f"weights of {len(weights)} layers were given, num_layers={num_layers}")
        if load is not None:
            as_snapshots(load)
        return held, ExpertWeights(weights or [[]] * num_layers, topology, control.rank)

    # What can be wrong on one rank is checked before anyone goes on.
    held, registered = control.attempt("registration", check)
    described = f"{topology} {shape} {options.model_dump_json()} {planner.model_dump_json()}"
    control.agree("topology, model and options", fingerprint(described))
    control.agree("the placement at the start", fingerprint(held))
    control.agree("the structure of the expert weights", fingerprint(registered.signature))
    start = _complete(channels, topology, held, num_logical, load)
    held = _restore_lost(channels, topology, held, start, restore)
    parts = Parts(
        topology=topology,
        planner=planner,
        options=options,
        channels=channels,
        start=start,
        window=LoadWindow(
            num_layers,
            num_logical,
            interval=options.interval,
            snapshots=options.snapshots,
            history=options.history,
            device=device,
        ),
        weights=registered,
        fingerprints=None,
        staging=Staging(options.staging_mib << 20),
        tables=DispatchTables(
            start, topology, rank=control.rank, local_first=options.local_first, device=device
        ),
        order=DeviceOrder(registered.device or device),
        switch=lambda layer, row, tables: None,
    )
    if not torch.equal(held, start.physical_to_logical):
        way = Move(parts, 0, held, num_logical, AtOnce(), lambda phase: None)
        with parts.order.background():
            way.run(start.physical_to_logical)
        parts.order.rejoin()
        if not torch.equal(way.now, start.physical_to_logical):
            raise TransferError("; ".join(way.notes))
    if options.verify == "off" or not registered.signature:
        return parts
    prints = ExpertFingerprints.make(registered, start, topology, control, options.verify)
    return replace(parts, fingerprints=prints)


def _check_placement(
    placement: Placement | torch.Tensor | None, num_layers: int, num_logical: int, topology: Topology
) -> torch.Tensor:
    """int64 [layers, slots] on the CPU, a copy: what is where, -1 for an empty slot."""
    if placement is None:
        placement = Placement.default(num_layers, num_logical, topology.num_slots)
    if isinstance(placement, Placement):
        placement.validate(topology)
        if (placement.num_layers, placement.num_logical) != (num_layers, num_logical):
            raise PlacementError(f"{placement} is not for {num_layers} layers of {num_logical} experts")
        placement = placement.physical_to_logical
    if placement.shape != (num_layers, topology.num_slots) or placement.dtype != torch.int64:
        raise PlacementError(
            f"placement is {placement.dtype} {tuple(placement.shape)}, "
            f"not int64 ({num_layers}, {topology.num_slots})"
        )
    least, most = int(placement.min()), int(placement.max())
    if least < -1 or most >= num_logical:
        raise PlacementError(f"placement has ids {least}..{most}, not -1..{num_logical - 1}")
    return placement.cpu().clone()


def _complete(
    channels: Channels, topology: Topology, held: torch.Tensor, num_logical: int, load: torch.Tensor | None
) -> Placement:
    """All ranks: the placement to start from: `held` itself where nothing is missing.

    What is there stays there. So no expert is overwritten whose only replica still has to go elsewhere; the
    rebalances that follow see to the balance.
    """
    if int(held.min()) >= 0 and not missing_experts(held, num_logical):
        return Placement(held, num_logical)
    control = channels.control
    (of_first, *_) = control.collect(None if load is None else load.cpu())
    if of_first is None:
        of_first = torch.ones(held.shape[0], num_logical)

    def fill_up() -> Placement:
        snapshots = as_snapshots(of_first)
        if snapshots.shape[1:] != (held.shape[0], num_logical):
            raise LoadError(
                f"load is for {snapshots.shape[1]} layers of {snapshots.shape[2]} experts, "
                f"not {held.shape[0]} of {num_logical}"
            )
        ids = complete(held, snapshots, effective_topology(topology, num_logical))
        return Placement(ids, num_logical)

    start = control.attempt("completing the placement", fill_up)
    control.agree("the placement to start from", fingerprint(start.physical_to_logical))
    return start


def _restore_lost(
    channels: Channels, topology: Topology, held: torch.Tensor, start: Placement, restore: Restore | None
) -> torch.Tensor:
    """All ranks: what is where once the experts that no rank holds have been loaded again."""
    goal = start.physical_to_logical
    lost = torch.stack([~torch.isin(after, before) for before, after in zip(held, goal, strict=True)])
    here = topology.slots_of_rank(channels.control.rank)

    def load_again() -> None:
        for layer, slot in lost[:, here].nonzero().tolist():
            if restore is None:
                named = missing_experts(held, start.num_logical)
                raise PlacementError(
                    f"no rank holds {len(named)} experts, (layer, expert) {list(named[:_NAMED])} and so on; "
                    "give `restore` to load them again"
                )
            restore(layer, int(goal[layer, here.start + slot]), slot)

    channels.control.attempt("restoring experts", load_again, PlacementError)
    return torch.where(lost, goal, held)
