"""Migration batches: the layers of a migration that are staged, verified and committed together.

Each batch fits into the staging buffer of every rank, and leaves a valid placement. A layer too large for the
buffer is split: its slots change in several batches, and every expert keeps a replica after each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...core.errors import TransferError
from ...core.placement import Placement
from ...core.topology import Topology
from .expert_weights import ExpertWeights
from .migration import MigrationPlan, plan_migration

__all__ = ["MigrationBatch", "plan_batches", "staging_bytes"]


@dataclass(frozen=True, eq=False)
class MigrationBatch:
    """The same on every rank.

    Attributes:
        layers: layers of the model, rising.
        physical_to_logical: int64 [layers of the batch, slots], the placement after the batch.
        migration: copies and sends; its layers are indices into `layers`.
        staging_bytes: int64 [ranks], staging memory that each rank needs.
    """

    layers: list[int]
    physical_to_logical: torch.Tensor
    migration: MigrationPlan
    staging_bytes: torch.Tensor

    def sent_bytes(self, weights: ExpertWeights) -> int:
        """Bytes of the experts that ranks send to each other, over all ranks."""
        return sum(weights.expert_bytes[self.layers[layer]] for layer in self.migration.sends.layer.tolist())


def plan_batches(
    before: torch.Tensor, after: torch.Tensor, weights: ExpertWeights, topology: Topology, bound: int
) -> tuple[list[MigrationBatch], dict[int, str]]:
    """Divide a migration into batches: neighbouring layers together, as many as fit.

    Every rank gets the same batches: tensors have the same sizes on all ranks, and nothing else counts.

    Args:
        before, after: int64 [layers, slots] on the CPU; -1 in `before` for a slot without usable weights.
        weights: of this rank.
        topology: ranks and slots.
        bound: bytes of the staging buffer on each rank.

    Returns:
        The batches in order; and for each layer that cannot change within the bound, the reason.
    """
    num_logical = int(after.max()) + 1
    changed = (before != after).any(1).nonzero().flatten().tolist()
    if not changed:
        return [], {}
    plan = plan_migration(
        Placement(before[changed], num_logical), Placement(after[changed], num_logical), topology
    )
    needed = staging_bytes(plan, changed, weights, topology)
    batches: list[MigrationBatch] = []
    impossible: dict[int, str] = {}
    for first, end in _runs(needed, bound):
        layers, total = changed[first:end], needed[first:end].sum(0)
        if int(total.max()) <= bound:
            part = plan if end - first == len(changed) else plan.of_layers(first, end)
            batches.append(MigrationBatch(layers, after[layers], part, total))
            continue
        (layer,) = layers
        try:
            batches += _split(layer, before[layer], after[layer], num_logical, weights, topology, bound)
        except TransferError as error:
            impossible[layer] = str(error)
    return batches, impossible


def staging_bytes(
    plan: MigrationPlan, layers: list[int], weights: ExpertWeights, topology: Topology
) -> torch.Tensor:
    """Staging memory that each layer needs on each rank: int64 [layers, ranks], bytes.

    Received experts and staged copies wait there; small rows are gathered there before they are sent. The
    layers of `plan` are indices into `layers`.
    """

    def count(layer: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
        ranks = topology.num_ranks
        return torch.bincount(layer * ranks + rank, minlength=len(layers) * ranks).view(-1, ranks)

    sends, copies = plan.sends, plan.copies
    received, sent = count(sends.layer, sends.rank), count(sends.layer, sends.source_rank)
    copied = count(copies.layer[copies.staged], copies.rank[copies.staged])
    expert = torch.tensor([[weights.staged_bytes[layer]] for layer in layers])
    coalesced = torch.tensor([[weights.coalesced_bytes[layer]] for layer in layers])
    return (received + copied) * expert + sent * coalesced


def _runs(needed: torch.Tensor, bound: int) -> Iterator[tuple[int, int]]:
    """(first, end) of neighbouring layers that fit together; a layer that does not fit at all is alone.

    `needed`: int64 [layers, ranks], bytes.
    """
    first, total = 0, torch.zeros_like(needed[0])
    for row, more in enumerate(needed):
        if row > first and int((total + more).max()) > bound:
            yield first, row
            first, total = row, torch.zeros_like(more)
        total = total + more
    yield first, len(needed)


def _split(
    layer: int,
    before: torch.Tensor,
    after: torch.Tensor,
    num_logical: int,
    weights: ExpertWeights,
    topology: Topology,
    bound: int,
) -> list[MigrationBatch]:
    """Batches of a layer that does not fit into `bound` at once: as many slots in each as fit.

    `before`, `after`: int64 [slots].

    Raises:
        TransferError: slots that have to change together need more than the bound.
    """

    def batch_of(held: torch.Tensor, slots: list[int]) -> MigrationBatch:
        rows = held.clone()
        rows[slots] = after[slots]
        plan = plan_migration(
            Placement(held[None], num_logical), Placement(rows[None], num_logical), topology
        )
        return MigrationBatch([layer], rows[None], plan, staging_bytes(plan, [layer], weights, topology)[0])

    batches: list[MigrationBatch] = []
    held, slots = before, list[int]()
    batch: MigrationBatch | None = None
    for group in _exchanges(before.tolist(), after.tolist()):
        larger = batch_of(held, slots + group)
        if batch is not None and int(larger.staging_bytes.max()) > bound:
            batches.append(batch)
            held, slots = batch.physical_to_logical[0], []
            larger = batch_of(held, group)
        needed = int(larger.staging_bytes.max())
        if needed > bound:
            raise TransferError(
                f"layer {layer} needs {needed / 2**20:.1f} MiB of staging memory to exchange "
                f"{len(group)} slots, staging_mib={bound >> 20}"
            )
        batch, slots = larger, slots + group
    return batches if batch is None else [*batches, batch]


def _exchanges(before: list[int], after: list[int]) -> Iterator[list[int]]:
    """Groups of slots that change together, in an order in which every expert always has a replica.

    A slot with the last replica of its expert changes together with a slot that gets this expert. A cycle of
    exchanges is one group.
    """
    count = Counter(before)
    pending = {slot for slot, expert in enumerate(before) if expert != after[slot]}
    # Empty slots first, since they only add replicas.
    for start in sorted(pending, key=lambda slot: (before[slot] >= 0, slot)):
        if start not in pending:
            continue
        group, slot = [], start
        while True:
            pending.discard(slot)
            group.append(slot)
            count[after[slot]] += 1
            leaving = before[slot]
            count[leaving] -= 1
            if leaving < 0 or count[leaving] > 0:
                break
            slot = min(slot for slot in pending if after[slot] == leaving)
        yield group
