"""From one placement to another, migration batch by migration batch: stage, verify, commit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch

from ..core.errors import TransferError, UndecidedError
from .context import Context
from .control.scheduling import Scheduler
from .repair import Repair, Slot, corrupted_sources
from .reports import DraftReport
from .weights.batching import MigrationBatch, plan_batches
from .weights.rounds import RoundLimits
from .weights.staging import stage_batch
from .weights.transfer import Transfer

__all__ = ["Staged", "relocate", "reserve", "stage"]


class Staged(NamedTuple):
    """What this rank has ready for the commit of one migration batch.

    Attributes:
        tables: of each layer, what its dispatch tables will be.
        corrupted: source slots of the experts that arrived corrupted.
        error: what failed here. All messages were sent and received nonetheless.
    """

    tables: Mapping[int, Any]
    corrupted: list[Slot]
    error: Exception | None


def relocate(
    context: Context,
    number: int,
    goal: torch.Tensor,
    scheduler: Scheduler,
    draft: DraftReport,
    corrupted: Sequence[Slot] = (),
) -> None:
    """All ranks: move weights and switch until `goal` is in force, as far as weights arrive sound.

    Args:
        number: of the rebalance.
        goal: int64 [layers, slots].
        draft: gets the figures, and notes why layers stay.
        corrupted: slots to fill anew.

    Raises:
        TransferError: on all ranks, if one of them failed. Batches committed before stay.
        RankLostError: another rank does not answer. UndecidedError: see `control/two_phase_commit.py`.
    """
    commit = context.connections.two_phase_commit.commit
    repair = Repair(context, number, goal, draft)
    repair.discard(corrupted)
    bound = context.options.staging_mib << 20
    names = (f"migration batch {index} of rebalance {number}" for index in count(1))
    while True:
        batches, impossible = plan_batches(repair.held, repair.goal, context.weights, context.topology, bound)
        scheduler.throttle.pause()
        for layer, reason in impossible.items():
            repair.keep(layer, reason)
        if not batches:
            return
        with draft.timing("transfer_seconds"):
            transfers, count_votes = reserve(context, number, batches, scheduler)
        for batch, transfer, name in zip(batches, transfers, names, strict=False):
            # 5. Stage: weights go to the staging memory. Nothing in force changes.
            with draft.timing("transfer_seconds"):
                staged = stage(context, batch, transfer, scheduler, count_votes)
            count_votes = _no_votes
            # 6. Two-phase commit: all ranks switch at the same step, or none does.
            switches = _switches(context, batch, transfer, staged)
            seconds = commit(
                name, switches, scheduler, error=staged.error, num_corrupted=len(staged.corrupted)
            )
            if seconds is None:
                repair.trace_back(staged.corrupted, scheduler.throttle)
                break
            repair.held[batch.layers] = batch.physical_to_logical
            moves, num_bytes = batch.migration.num_sends, batch.sent_bytes(context.weights)
            draft.add(commit_seconds=seconds, moves=moves, bytes_moved=num_bytes)
        else:
            return


def reserve(
    context: Context, number: int, batches: Sequence[MigrationBatch], scheduler: Scheduler
) -> tuple[list[Transfer], Callable[[], object]]:
    """All ranks: reserve and lay out the staging memory for all batches, and begin one vote on it.

    Without that vote, some ranks would send what a rank without memory never receives.

    Returns:
        A transfer for each batch; and the count of the votes, due before anything is sent.

    Raises:
        TransferError: this rank failed, and the others are told so.
    """
    scheduler.throttle.ranks_met()
    rank, transport = context.connections.control.rank, context.connections.transport
    limits = RoundLimits(scheduler.round_bytes, transport.max_messages)
    transfers: list[Transfer] = []
    error = None
    try:
        sizes = [int(batch.staging_bytes[rank]) for batch in batches]
        buffer = context.staging.reserve(max(sizes), context.weights.device or transport.device)
        for batch, size in zip(batches, sizes, strict=True):
            staged = stage_batch(batch, context.weights, context.topology, rank, buffer[:size], limits)
            transfers.append(Transfer(staged, transport))
            scheduler.throttle.pause()
    except Exception as caught:  # every kind, since the other ranks wait
        error = caught
    phase = f"reserving staging memory in rebalance {number}"
    count_votes = context.connections.control.begin_vote(phase, error, raises=TransferError)
    if error is not None:
        count_votes()  # raises
    return transfers, count_votes


def stage(
    context: Context,
    batch: MigrationBatch,
    transfer: Transfer,
    scheduler: Scheduler,
    count_votes: Callable[[], object],
) -> Staged:
    """All ranks: get the weights of one batch into the staging memory, and verify them there.

    A failure of this rank goes to the vote of the commit: the other ranks have messages under way.
    `count_votes` is called before anything is sent.

    Raises:
        RankLostError: another rank does not answer. The error of `count_votes`.
    """
    throttle = scheduler.throttle
    throttle.ranks_met()
    tables: Mapping[int, Any] = {}
    corrupted: list[Slot] = []
    error: Exception | None = None
    context.streams.catch_up()
    transfer.fill_first()  # while the votes are on their way
    count_votes()
    transfer.start()
    try:
        tables = context.in_force.tables.prepare(batch.physical_to_logical, batch.layers)
    except Exception as caught:  # every kind, since the other ranks wait
        error = caught
    for arrivals in transfer.receive(context.streams, throttle):
        try:
            corrupted += corrupted_sources(context, arrivals, throttle)
        except Exception as caught:
            error = error or caught
    context.transfer_times.add(transfer.rounds)
    return Staged(tables, corrupted, error or transfer.failure)


def _switches(
    context: Context, batch: MigrationBatch, transfer: Transfer, staged: Staged
) -> list[Callable[[], None]]:
    """What the serving thread does in one step each: `commit_layers` layers of the batch."""

    def switch(layers: Sequence[int]) -> None:
        try:
            for layer in layers:
                transfer.commit(layer)
                row = batch.physical_to_logical[batch.layers.index(layer)]
                context.in_force.switch(layer, row, staged.tables[layer])
        except Exception as failure:
            raise UndecidedError(f"layers {layers} did not switch on this rank: {failure}") from failure
        context.streams.mark()

    size = context.options.commit_layers
    return [partial(switch, batch.layers[at : at + size]) for at in range(0, len(batch.layers), size)]


def _no_votes() -> None:
    """There are no votes to count."""
