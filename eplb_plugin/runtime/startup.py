"""The start of a loop: checks, agreement, lost experts, and experts for slots that lack them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..config.options import PlannerOptions, RebalancerOptions
from ..core.errors import LoadError, PlacementError, TopologyError, TransferError
from ..core.load import as_snapshots
from ..core.placement import Placement
from ..core.topology import Topology
from ..dispatch.expert_cost import resolve_expert_cost
from ..dispatch.registry import Serving, find_dispatch
from ..planning.elastic import complete, missing_experts
from ..planning.hierarchy import effective_topology
from .connections import Connections
from .context import Context, PlacementInForce
from .control.rank_group import RankGroup, content_hash
from .control.scheduling import AtOnce
from .load_window import LoadWindow
from .move_times import TransferTimes
from .recorder import Recorder
from .relocation import relocate
from .reports import DraftReport
from .verify.fingerprints import ExpertFingerprints
from .weights.expert_weights import ExpertWeights
from .weights.staging import Staging
from .weights.streams import DeviceOrder

__all__ = ["Restore", "regroup", "register_again", "start_up"]

Restore = Callable[[int, int, int], None]
"""restore(layer, expert, slot): write an expert's weights to a slot of this rank, counted on this rank."""

_NAMED = 5  # experts in an error


def start_up(
    connections: Connections,
    topology: Topology,
    shape: tuple[int, int],
    *,
    weights: Sequence[Sequence[torch.Tensor]] | None,
    placement: Placement | torch.Tensor | None,
    restore: Restore | None,
    load: torch.Tensor | None,
    options: RebalancerOptions,
    planner: PlannerOptions,
    group: RankGroup,
) -> Context:
    """All ranks: check and agree, load lost experts again, and move experts to the slots that lack them.

    Arguments and errors as of `Rebalancer`; `shape`: layers, and experts of a layer; `group`: the engine's.
    """
    num_layers, num_logical = shape
    control, device = connections.control, group.device

    def check() -> tuple[torch.Tensor, ExpertWeights, int, Recorder | None]:
        if not min(topology.slots_by_rank):
            raise TopologyError(f"{topology} has ranks without slots; leave them out of the group")
        held = _check_placement(placement, num_layers, num_logical, topology)
        if weights is not None and len(weights) != num_layers:
            raise TransferError(f"weights of {len(weights)} layers were given, num_layers={num_layers}")
        if load is not None:
            as_snapshots(load)
        find_dispatch(options.dispatch)
        cost = resolve_expert_cost(options.expert_cost, weights[0] if weights else (), device)
        registered = ExpertWeights(weights or [[]] * num_layers, topology, control.rank)
        return held, registered, cost, _recorder(options, topology) if control.rank == 0 else None

    # 1. Check what can be wrong on one rank, before any rank goes on.
    held, registered, expert_cost, recorder = control.attempt("registration", check)

    # 2. Agree on what has to be the same on all ranks.
    described = f"{topology} {shape} {options.model_dump_json()} {planner.model_dump_json()}"
    control.agree("topology, model and options", content_hash(described))
    control.agree("the placement at the start", content_hash(held))
    control.agree("the structure of the expert weights", content_hash(registered.signature))
    control.agree("expert_cost", expert_cost)  # `auto` differs between accelerators

    # 3. Complete the placement, and load experts again that no rank holds.
    start = _complete(connections, topology, held, num_logical, load)
    held = _restore_lost(connections, topology, held, start, restore)

    # 4. Take the fingerprints of all experts, so that the next phase is verified too.
    prints = None
    if options.verify != "off" and options.mode != "observe" and registered.signature:
        holding = Placement(held, num_logical)
        prints = ExpertFingerprints.make(registered, holding, topology, control, options.verify)
    gather = group.all_gather_at_once if options.batch == "sharded" and group.size > 1 else None
    serving = Serving(control.rank, device, expert_cost, gather)
    tables = find_dispatch(options.dispatch)(start, topology, serving)
    window = LoadWindow(
        *shape,
        interval=options.interval,
        snapshots=options.snapshots,
        samples=options.samples if options.keeps_samples else 0,
        history=options.history,
        device=device,
    )
    context = Context(
        topology=topology,
        planner=planner,
        options=options,
        connections=connections,
        window=window,
        weights=registered,
        fingerprints=prints,
        staging=Staging(options.staging_mib << 20),
        in_force=PlacementInForce(held, num_logical, tables),
        expert_cost=expert_cost,
        streams=DeviceOrder(registered.device or device),
        transfer_times=TransferTimes(),
        recorder=recorder,
    )

    # 5. Fill the slots that are still empty.
    if not torch.equal(held, start.physical_to_logical):
        draft = DraftReport()
        with context.streams.background():
            relocate(context, 0, start.physical_to_logical, AtOnce(), draft)
        context.streams.rejoin()
        if not torch.equal(context.in_force.physical_to_logical, start.physical_to_logical):
            raise TransferError("; ".join(draft.notes))
    return context


def register_again(context: Context) -> Context:
    """All ranks, after the engine has loaded other weights: register them, and take their fingerprints.

    The weights of `context` are released.

    Raises:
        TransferError: a tensor has a layout that cannot be moved. AgreementError: ranks differ in the
        structure. RankLostError: another rank does not answer.
    """
    control = context.connections.control

    def register() -> ExpertWeights:
        context.weights.release()
        return context.weights.again()

    weights = control.attempt("registering weights again", register, TransferError)
    control.agree("the structure of the expert weights", content_hash(weights.signature))
    prints = context.fingerprints
    if prints is not None:
        placement = context.in_force.placement
        prints = ExpertFingerprints.make(weights, placement, context.topology, control, prints.coverage)
    weights.claim()
    return replace(context, weights=weights, fingerprints=prints)


def regroup(
    placement: Placement, topology: Topology, ranks: Sequence[int | None], *, new_slots: int | None = None
) -> torch.Tensor:
    """The slots of a smaller or larger group, filled from the old one: its `Rebalancer` starts from them.

    Args:
        placement: in force when the old group ended.
        topology: of the old group.
        ranks: for each rank of the new group its old rank, or None if it is new. `[0, 1, 3]`: rank 2 is gone.
        new_slots: slots of each new rank; None: as many as every old rank has.

    Returns:
        int64 [layers, slots of the new group], the logical expert in each slot; -1 in the slots of a new
        rank. Experts that only missing ranks held do not occur.

    Raises:
        TopologyError: a rank that the old group did not have, or one twice; or old ranks differ in slots,
            and new ranks have no `new_slots`.
        PlacementError: the placement does not fit the topology.
    """
    placement.validate(topology)
    known = [rank for rank in ranks if rank is not None]
    unknown = [rank for rank in known if not 0 <= rank < topology.num_ranks]
    if unknown or len(set(known)) < len(known) or not ranks:
        raise TopologyError(
            f"ranks={list(ranks)} are not ranks of an old group of {topology.num_ranks}, each once"
        )
    held = placement.physical_to_logical.cpu()
    if None in ranks and new_slots is None:
        new_slots = topology.slots_per_rank
    new = held.new_full((placement.num_layers, new_slots or 0), -1)
    return torch.cat([new if rank is None else held[:, topology.slots_of_rank(rank)] for rank in ranks], 1)


def _check_placement(
    placement: Placement | torch.Tensor | None, num_layers: int, num_logical: int, topology: Topology
) -> torch.Tensor:
    """int64 [layers, slots] on the CPU, a copy: the expert in each slot, -1 for an empty one."""
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


def _recorder(options: RebalancerOptions, topology: Topology) -> Recorder | None:
    """Of the first rank. ConfigError: the folder cannot be made."""
    if options.record is None:
        return None
    # With dispatch `balanced` of replicated tokens, every rank records all of them.
    replicated = options.dispatch == "balanced" and options.batch == "replicated"
    return Recorder(options.record, options.record_mib, copies=topology.num_ranks if replicated else 1)


def _complete(
    connections: Connections,
    topology: Topology,
    held: torch.Tensor,
    num_logical: int,
    load: torch.Tensor | None,
) -> Placement:
    """All ranks: the placement to start from: `held` itself if nothing is missing.

    No expert leaves its slot, so the only replica of one is never overwritten. Balance is left to later
    rebalances.
    """
    if int(held.min()) >= 0 and not missing_experts(held, num_logical):
        return Placement(held, num_logical)
    control = connections.control
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
        return Placement(complete(held, snapshots, effective_topology(topology, num_logical)), num_logical)

    start = control.attempt("completing the placement", fill_up)
    control.agree("the placement to start from", content_hash(start.physical_to_logical))
    return start


def _restore_lost(
    connections: Connections,
    topology: Topology,
    held: torch.Tensor,
    start: Placement,
    restore: Restore | None,
) -> torch.Tensor:
    """All ranks: load experts again that no rank holds; int64 [layers, slots], the expert in each slot."""
    goal = start.physical_to_logical
    lost = torch.stack([~torch.isin(after, before) for before, after in zip(held, goal, strict=True)])
    here = topology.slots_of_rank(connections.control.rank)

    def load_again() -> None:
        for layer, slot in lost[:, here].nonzero().tolist():
            if restore is None:
                named = missing_experts(held, start.num_logical)
                raise PlacementError(
                    f"no rank holds {len(named)} experts, (layer, expert) {list(named[:_NAMED])} and so on; "
                    "give `restore` to load them again"
                )
            restore(layer, int(goal[layer, here.start + slot]), slot)

    connections.control.attempt("restoring experts", load_again, PlacementError)
    return torch.where(lost, goal, held)
