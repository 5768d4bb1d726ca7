"""From one placement to another, batch by batch, as far as weights arrive sound."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from ..core.errors import TransferError
from .context import Parts
from .control.scheduling import Pace
from .crossing import Crossing
from .repair import Damage
from .weights.batching import MigrationBatch, plan_batches

__all__ = ["Move"]


class Move:
    """The way of all ranks to a new placement; all ranks make it together.

    Args:
        parts: of the rank.
        number: of the rebalance.
        now: int64 [layers, slots], what is in force; -1 where nothing is yet.
        num_logical: experts of a layer.
        pace: how to work and when to switch over.
        enter: told of each phase.

    Attributes:
        now: what is in force.
        damage: what was found on the way.
        notes: why layers stay as they are.
        moves: experts that were sent.
        num_bytes: bytes of these.
        transfer_seconds, commit_seconds: time to stage, and to switch over.
    """

    def __init__(
        self,
        parts: Parts,
        number: int,
        now: torch.Tensor,
        num_logical: int,
        pace: Pace,
        enter: Callable[[str], None],
    ) -> None:
        self._parts = parts
        self._number = number
        self._pace = pace
        self._enter = enter
        self._crossings = 0
        self.now = now
        self.damage = Damage(parts, number, num_logical)
        self.notes: list[str] = []
        self.moves = 0
        self.num_bytes = 0
        self.transfer_seconds = 0.0
        self.commit_seconds = 0.0

    def run(self, goal: torch.Tensor, damaged: Sequence[tuple[int, int]] = ()) -> None:
        """All ranks: go to `goal`, as far as weights arrive sound; `notes` say of which layers they do not.

        Args:
            goal: int64 [layers, slots].
            damaged: (layer, slot) that do not hold what they should; they are filled anew.

        Raises:
            TransferError: on all ranks, when one of them failed before a batch was committed; batches before
                that stay. RankLostError: another rank does not answer. UndecidedError: see there.
        """
        goal, held = goal.clone(), self.now.clone()

        def keep(layer: int, reason: str) -> None:
            held[layer] = goal[layer] = self.now[layer]
            self.notes.append(reason)

        def set_aside(slots: Sequence[tuple[int, int]]) -> None:
            for layer, experts in self.damage.empty(held, slots).items():
                keep(layer, f"experts {experts} of layer {layer} have no sound replica")

        set_aside(damaged)
        while True:
            parts = self._parts
            bound = parts.options.staging_mib << 20
            batches, impossible = plan_batches(held, goal, parts.weights, parts.topology, bound)
            self._pace.rest()
            for layer, reason in impossible.items():
                keep(layer, reason)
            crossings, agreed = self._prepare(batches)
            for batch, crossing in zip(batches, crossings, strict=True):
                bad = self._cross(crossing, agreed)
                agreed = _nothing
                if bad is not None:
                    slots, given_up = self.damage.trace_back(bad, self.now)
                    for layer in given_up:
                        keep(layer, f"experts of layer {layer} were damaged on their way more than once")
                    set_aside(slots)
                    break
                held[batch.layers] = batch.physical_to_logical
            else:
                return

    def _prepare(self, batches: Sequence[MigrationBatch]) -> tuple[list[Crossing], Callable[[], object]]:
        """All ranks: one vote for all batches, that no rank lacks the memory to send and receive.

        Otherwise some would send what others never receive. What fails later is put to the vote of its batch.

        Returns:
            A crossing for each batch; and what to call before anything is sent, which counts the votes.
        """
        if not batches:
            return [], _nothing
        parts = self._parts
        self._enter("stage")
        start = time.perf_counter()
        crossings: list[Crossing] = []
        error = None
        try:
            for batch in batches:
                self._crossings += 1
                name = f"batch {self._crossings} in rebalance {self._number}"
                crossings.append(Crossing(batch, name, parts, self.damage, self._pace, self._enter))
            device = parts.weights.device or parts.channels.data.device
            buffer = parts.staging.reserve(max(crossing.staged_bytes for crossing in crossings), device)
            for crossing in crossings:
                crossing.lay_out(buffer[: crossing.staged_bytes])
                self._pace.rest()
        except Exception as caught:  # every kind, since the other ranks wait
            error = caught
        phase = f"preparing to move weights in rebalance {self._number}"
        agreed = parts.channels.control.begin_vote(phase, error, raises=TransferError)
        if error is not None:
            agreed()  # which raises
        self.transfer_seconds += time.perf_counter() - start
        return crossings, agreed

    def _cross(self, crossing: Crossing, agreed: Callable[[], object]) -> list[tuple[int, int]] | None:
        """All ranks: None when it is done; else nothing has changed, since experts arrived damaged on some
        rank: where those on this rank came from."""
        crossing.stage(agreed)
        done = crossing.commit(self._switch)
        self.transfer_seconds += crossing.transfer_seconds
        self.commit_seconds += crossing.commit_seconds
        if not done:
            return crossing.bad
        self.moves += crossing.moves
        self.num_bytes += crossing.num_bytes
        return None

    def _switch(self, layer: int, row: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.now[layer] = row
        self._parts.switch(layer, row, tables)


def _nothing() -> None:
    """There is nothing to agree on."""
