"""One migration batch, made by all ranks together: staged, checked, and committed on all or none."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ..core.errors import EplbError, RankLostError, TransferError, UndecidedError
from .context import Parts
from .control.scheduling import Pace
from .repair import Damage
from .weights.batching import MigrationBatch
from .weights.rounds import RoundLimits
from .weights.staging import Arrival, stage_batch
from .weights.transfer import Transfer

__all__ = ["Crossing"]

# In place of the step that a rank proposes.
_DAMAGED = -1
_NOBODY_TO_ASK = -2


class Crossing:
    """All ranks call `lay_out`, then `stage`, then `commit`.

    Args:
        batch: the same on every rank.
        name: the same on every rank, another one for each.
        parts: of the rank.
        damage: what was found so far.
        pace: how to work and when to switch over.
        enter: told of each phase.

    Attributes:
        bad: once staged: where experts came from that arrived damaged on this rank.
        moves: experts that are sent.
        num_bytes: bytes of these.
        transfer_seconds, commit_seconds: time to stage, and to switch over.
    """

    def __init__(
        self,
        batch: MigrationBatch,
        name: str,
        parts: Parts,
        damage: Damage,
        pace: Pace,
        enter: Callable[[str], None],
    ) -> None:
        self._batch = batch
        self._name = name
        self._parts = parts
        self._damage = damage
        self._pace = pace
        self._enter = enter
        self._tables: Mapping[int, Any] = {}
        self._error: Exception | None = None
        self.bad: list[tuple[int, int]] = []
        self.moves = batch.migration.num_sends
        self.num_bytes = batch.sent_bytes(parts.weights)
        self.transfer_seconds = self.commit_seconds = 0.0

    @property
    def staged_bytes(self) -> int:
        """Staging memory that it takes up on this rank."""
        return int(self._batch.staging_bytes[self._parts.channels.control.rank])

    def lay_out(self, buffer: torch.Tensor) -> None:
        """Take the staging memory, uint8 [staged_bytes]. Nothing is read or written yet."""
        parts, batch = self._parts, self._batch
        limits = RoundLimits(self._pace.piece, parts.channels.data.max_messages)
        rank = parts.channels.control.rank
        self._transfer = Transfer(stage_batch(batch, parts.weights, parts.topology, rank, buffer, limits))

    def stage(self, agreed: Callable[[], object]) -> None:
        """Get the weights into the staging memory, and compare them with their fingerprints.

        What fails on this rank is put to the vote of `commit`: the others have messages under way.

        Args:
            agreed: called before anything is sent; raises where that must not happen.

        Raises:
            RankLostError: another rank does not answer. What `agreed` raises.
        """
        self._enter("stage")
        start = time.perf_counter()
        parts, pace, transfer = self._parts, self._pace, self._transfer
        transport = parts.channels.data
        parts.order.catch_up()

        def tables() -> None:
            self._tables = parts.tables.prepare(self._batch.physical_to_logical, self._batch.layers)

        def after(num_bytes: int, seconds: float) -> None:
            pace.moved(num_bytes, seconds)
            pace.rest()

        def check(arrivals: Sequence[Arrival]) -> None:
            self._attempt(lambda: self.bad.extend(self._damage.arrived_damaged(arrivals, pace.rest)))

        transfer.start(transport, agreed)
        self._attempt(tables)
        transfer.finish(transport, check, parts.order.settle, after, pace.rest)
        self._error = self._error or transfer.failure
        self.transfer_seconds += time.perf_counter() - start

    def commit(self, switch: Callable[[int, torch.Tensor, tuple[torch.Tensor, torch.Tensor]], None]) -> bool:
        """Switch over in the same step on all ranks, if all are ready; whether that was done. Nothing has
        changed otherwise.

        Args:
            switch: puts a layer in force, its weights being in place: its row and its tables.

        Raises:
            TransferError: on all ranks, when one of them failed: nothing has changed. RankLostError: another
                rank does not answer. UndecidedError: see there.
        """

        def write(layers: Sequence[int]) -> None:
            try:
                for layer in layers:
                    self._transfer.commit(layer)
                    switch(
                        layer,
                        self._batch.physical_to_logical[self._batch.layers.index(layer)],
                        self._tables[layer],
                    )
            except Exception as failure:
                raise UndecidedError(
                    f"layers {layers} did not switch over on this rank: {failure}"
                ) from failure
            self._parts.order.mark()

        size, layers = self._parts.options.commit_layers, self._batch.layers
        groups = [layers[at : at + size] for at in range(0, len(layers), size)]
        return self._agree_on([partial(write, group) for group in groups])

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as caught:  # every kind, since the other ranks wait
            self._error = self._error or caught

    def _agree_on(self, commits: Sequence[Callable[[], None]]) -> bool:
        """All ranks: have `commits` done from the same step on, if all are ready; whether that was done."""
        channels, pace = self._parts.channels, self._pace
        phase = f"switching over, {self._name}"
        if pace.piece is not None:
            # Ranks that rest are ready at different times, and nobody's steps should wait for that.
            damaged = channels.control.vote(phase, self._error, len(self.bad), TransferError)
            if any(damaged):
                return False
        self._enter("commit")
        can_ask = channels.decisions.answers()
        fence = pace.propose()
        steps: list[int] = []
        lost: Exception | None = None
        # A rank with damaged arrivals is not ready: it proposes no step.
        value = _NOBODY_TO_ASK if not can_ask else _DAMAGED if self.bad else fence
        try:
            steps = channels.control.vote(phase, self._error, value, TransferError)
        except Exception as caught:
            told = isinstance(caught, EplbError) and not isinstance(caught, RankLostError)
            if told or value < 0 or self._error is not None:
                # Nobody switches over without the vote of this rank.
                pace.release(None)
                raise
            # Others may have every vote, so this rank has to ask what became of it.
            lost = caught
        if _NOBODY_TO_ASK in steps:
            pace.release(None)
            silent = [rank for rank, step in enumerate(steps) if step == _NOBODY_TO_ASK]
            raise RankLostError(
                f"ranks {silent} cannot ask the store, which has the last word on every commit"
            )
        if _DAMAGED in steps:
            pace.release(None)
            return False
        proposal = "keep" if lost is not None else str(max(steps))
        decision = channels.decisions.decide(self._name, proposal)
        try:
            self._enter("decided")
            if decision == "keep":
                raise lost or RankLostError("a rank could not be reached when all were ready to switch over")
            self.commit_seconds += pace.release(int(decision), commits)
        except EplbError:
            raise
        except Exception as failure:
            if decision == "keep":
                raise
            raise UndecidedError(f"this rank did not switch over as was decided: {failure}") from failure
        if lost is not None:
            raise lost
        return True
