"""From one placement to another in hops that each fit into the staging memory and are valid on their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...core.errors import TransferError
from ...core.placement import Placement
from ...core.topology import Topology
from .expert_weights import ExpertWeights
from .migration import Arrivals, Copies, MigrationPlan, Reloads, Sends, plan_migration

__all__ = ["Hop", "plan_hops", "staged_bytes"]


@dataclass(frozen=True, eq=False)
class Hop:
    """Layers that are staged together.

    Attributes:
        layers: rising.
        after: int64 [layers of the hop, slots], what they hold after it.
        migration: what has to be copied and sent; its layers are indices into `layers`.
        staged: int64 [ranks], bytes of staging memory that it takes up.
    """

    layers: list[int]
    after: torch.Tensor
    migration: MigrationPlan
    staged: torch.Tensor


def plan_hops(
    before: torch.Tensor,
    after: torch.Tensor,
    weights: ExpertWeights,
    topology: Topology,
    bound: int,
) -> tuple[list[Hop], dict[int, str]]:
    """Cut the way from `before` to `after` into hops: neighbouring layers together, as many as fit.

    A layer that does not fit alone changes in parts: slots whose old expert would lose its last replica
    change together with those that take it up, so that every part leaves each expert a replica. Every rank
    gets the same hops, since they follow from the arguments, and ranks differ in no size of a tensor.

    Args:
        before, after: int64 [layers, slots] on the CPU; -1 in `before` for a slot without usable weights.
        weights: what this rank holds.
        topology: ranks and slots.
        bound: bytes of staging memory on each rank.

    Returns:
        The hops; and the layers that cannot move within the bound, with the reason.
    """
    num_logical = int(after.max()) + 1
    changed = (before != after).any(1).nonzero().flatten().tolist()
    if not changed:
        return [], {}
    whole = plan_migration(
        Placement(before[changed], num_logical), Placement(after[changed], num_logical), topology
    )
    need = staged_bytes(whole, changed, weights, topology)
    hops: list[Hop] = []
    impossible: dict[int, str] = {}
    first = 0  # of the rows that are not in a hop yet

    def close(end: int) -> None:
        nonlocal first
        if first < end:
            rows = slice(first, end)
            plan = whole if end - first == len(changed) else _only(whole, first, end)
            hops.append(Hop(changed[rows], after[changed[rows]], plan, need[rows].sum(0)))
        first = end

    for row, layer in enumerate(changed):
        if int(need[row].max()) > bound:
            close(row)
            try:
                hops += _parts(layer, before[layer], after[layer], num_logical, weights, topology, bound)
            except TransferError as error:
                impossible[layer] = str(error)
            first = row + 1
        elif int(need[first : row + 1].sum(0).max()) > bound:
            close(row)
    close(len(changed))
    return hops, impossible


def staged_bytes(
    plan: MigrationPlan, layers: list[int], weights: ExpertWeights, topology: Topology
) -> torch.Tensor:
    """Staging memory that each layer needs on each rank: int64 [layers, ranks], bytes.

    Args:
        plan: its layers are indices into `layers`.
    """
    ranks = topology.num_ranks
    received, staged, sent = (
        torch.bincount(key, minlength=len(layers) * ranks).view(-1, ranks)
        for key in (
            plan.sends.layer * ranks + plan.sends.rank,
            (plan.copies.layer * ranks + plan.copies.rank)[plan.copies.staged],
            plan.sends.layer * ranks + plan.sends.source_rank,
        )
    )
    row = torch.tensor([weights.staged_bytes(layer) for layer in layers])
    packed = torch.tensor([weights.packed_bytes(layer) for layer in layers])
    return (received + staged) * row[:, None] + sent * packed[:, None]


def _parts(
    layer: int,
    before: torch.Tensor,
    after: torch.Tensor,
    num_logical: int,
    weights: ExpertWeights,
    topology: Topology,
    bound: int,
) -> list[Hop]:
    """The hops of one layer that does not fit into `bound` at once. TransferError where no way does."""

    def hop(start: list[int], slots: list[int]) -> tuple[Hop, int]:
        end = list(start)
        for slot in slots:
            end[slot] = goal[slot]
        old, new = (Placement(torch.tensor([row]), num_logical) for row in (start, end))
        plan = plan_migration(old, new, topology)
        need = staged_bytes(plan, [layer], weights, topology)
        return Hop([layer], new.physical_to_logical, plan, need.sum(0)), int(need.max())

    goal = after.tolist()
    now = before.tolist()
    hops: list[Hop] = []
    batch: list[int] = []
    for piece in _pieces(now, goal):
        _, need = hop(now, batch + piece)
        if need > bound and batch:
            hops.append(hop(now, batch)[0])
            now = hops[-1].after[0].tolist()
            batch = []
            _, need = hop(now, piece)
        if need > bound:
            raise TransferError(
                f"layer {layer} needs {need / 2**20:.1f} MiB of staging memory to exchange "
                f"{len(piece)} slots, staging_mib={bound >> 20}"
            )
        batch += piece
    if batch:
        hops.append(hop(now, batch)[0])
    return hops


def _pieces(before: list[int], after: list[int]) -> list[list[int]]:
    """Slots that change together, in an order in which every expert always has a replica."""
    count: dict[int, int] = {}
    for expert in before:
        count[expert] = count.get(expert, 0) + 1
    pending = {slot for slot, expert in enumerate(before) if expert != after[slot]}
    pieces = []
    # Empty slots first: they only add replicas. Then whatever is there several times.
    for start in sorted(pending, key=lambda slot: (before[slot] >= 0, slot)):
        if start not in pending:
            continue
        piece, slot = [], start
        while True:
            pending.discard(slot)
            piece.append(slot)
            count[after[slot]] = count.get(after[slot], 0) + 1
            leaving = before[slot]
            count[leaving] -= 1
            if leaving < 0 or count[leaving] > 0:
                break
            # The last replica is about to go: take up a slot that gets this expert.
            slot = min(slot for slot in pending if after[slot] == leaving)
        pieces.append(piece)
    return pieces


def _only(plan: MigrationPlan, first: int, last: int) -> MigrationPlan:
    """The part of a plan that changes its layers from `first` to before `last`, which become 0 and so on."""

    def within(layers: torch.Tensor) -> slice:
        ends = torch.searchsorted(layers, torch.tensor([first, last])).tolist()
        return slice(*ends)

    sends, copies, reloads = (within(part.layer) for part in (plan.sends, plan.copies, plan.reloads))
    arriving = slice(
        *torch.searchsorted(plan.arrivals.send, torch.tensor([sends.start, sends.stop])).tolist()
    )
    return MigrationPlan(
        layers=torch.arange(last - first),
        copies=Copies(
            layer=plan.copies.layer[copies] - first,
            rank=plan.copies.rank[copies],
            source_slot=plan.copies.source_slot[copies],
            slot=plan.copies.slot[copies],
            staged=plan.copies.staged[copies],
        ),
        sends=Sends(
            layer=plan.sends.layer[sends] - first,
            expert=plan.sends.expert[sends],
            source_rank=plan.sends.source_rank[sends],
            source_slot=plan.sends.source_slot[sends],
            rank=plan.sends.rank[sends],
        ),
        arrivals=Arrivals(send=plan.arrivals.send[arriving] - sends.start, slot=plan.arrivals.slot[arriving]),
        reloads=Reloads(
            layer=plan.reloads.layer[reloads] - first,
            expert=plan.reloads.expert[reloads],
            slot=plan.reloads.slot[reloads],
        ),
    )
