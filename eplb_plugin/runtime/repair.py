"""Corrupted weights: found by their fingerprints, named to all ranks, and replaced from sound replicas."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..core.errors import TransferError
from .context import Context
from .control.throttle import Throttle
from .reports import DraftReport
from .weights.staging import Arrival

__all__ = ["AUDIT_TURNS", "Repair", "Slot", "audit", "corrupted_sources"]

Slot = tuple[int, int]
"""(layer, slot), slots numbered over all ranks."""

AUDIT_TURNS = 8  # rebalances after which every layer was audited once
_ATTEMPTS = 2  # transfers of a layer that may be corrupted although their sources are sound
_AT_ONCE = 32  # arrivals between two pauses


def audit(context: Context, number: int, throttle: Throttle) -> list[Slot]:
    """All ranks: the corrupted slots of all ranks, in an eighth of the layers in turn.

    Rebalance 3 of 61 layers audits the layers 3, 11, 19 and so on. Without fingerprints nothing is done.

    Raises:
        TransferError: on all ranks, if one of them cannot read its weights.
    """
    if context.fingerprints is None:
        return []
    throttle.ranks_met()
    context.streams.catch_up()
    layers = range(number % AUDIT_TURNS, context.window.num_layers, AUDIT_TURNS)
    return _corrupted_slots(context, f"comparing fingerprints in rebalance {number}", layers, throttle)


def corrupted_sources(context: Context, arrivals: Sequence[Arrival], throttle: Throttle) -> list[Slot]:
    """This rank: the source slots of those arrivals whose fingerprint is wrong."""
    fingerprints = context.fingerprints
    if fingerprints is None:
        return []
    wrong: list[Arrival] = []
    for first in range(0, len(arrivals), _AT_ONCE):
        wrong += fingerprints.wrong_arrivals(arrivals[first : first + _AT_ONCE])
        throttle.pause()
    return [(arrival.layer, arrival.source_slot) for arrival in wrong]


class Repair:
    """What a relocation can use and still reach, given the corruption found so far; the same on all ranks.

    Args:
        goal: int64 [layers, slots], where the relocation goes.
        draft: counts mismatches, and notes why layers stay.

    Attributes:
        held: int64 [layers, slots], the expert in each slot; -1 where it is missing or corrupted.
        goal: with the rows in force for layers that have to stay.
    """

    def __init__(self, context: Context, number: int, goal: torch.Tensor, draft: DraftReport) -> None:
        self._context, self._number, self._draft = context, number, draft
        self._attempts: dict[int, int] = {}
        self.held = context.in_force.physical_to_logical.clone()
        self.goal = goal.clone()

    def keep(self, layer: int, reason: str) -> None:
        """Leave a layer as it is."""
        self.held[layer] = self.goal[layer] = self._context.in_force.physical_to_logical[layer]
        self._draft.notes.append(reason)

    def discard(self, slots: Sequence[Slot]) -> None:
        """Treat corrupted slots as empty, so that they are filled from sound replicas.

        A layer with an expert that has no sound replica stays.
        """
        new = [slot for slot in slots if int(self.held[slot]) >= 0]
        self._draft.add(mismatches=len(new))
        for slot in new:
            self.held[slot] = -1
        for layer in sorted({layer for layer, _ in new}):
            sound = set(self.held[layer].tolist())
            lost = [expert for expert in range(self._context.window.num_logical) if expert not in sound]
            if lost:
                self.keep(layer, f"experts {lost} of layer {layer} have no sound replica")

    def trace_back(self, sources: Sequence[Slot], throttle: Throttle) -> None:
        """All ranks, after experts arrived corrupted on any of them: discard corrupted sources.

        A layer with sound sources, corrupted in transfer for the second time, stays. `sources`: of the
        corrupted arrivals on this rank.

        Raises:
            TransferError: on all ranks, if one of them cannot read its weights.
        """
        control = self._context.connections.control
        reported = {slot for slots in control.collect(list(sources)) for slot in slots}
        layers = sorted({layer for layer, _ in reported})
        phase = f"tracing corrupted arrivals in rebalance {self._number}"
        slots = _corrupted_slots(self._context, phase, layers, throttle)
        in_transfer = sorted({layer for layer, _ in reported.difference(slots)})
        self._draft.add(mismatches=len(in_transfer))
        for layer in in_transfer:
            self._attempts[layer] = self._attempts.get(layer, 0) + 1
            if self._attempts[layer] >= _ATTEMPTS:
                self.keep(layer, f"experts of layer {layer} were corrupted in transfer more than once")
        self.discard(slots)


def _corrupted_slots(context: Context, phase: str, layers: Sequence[int], throttle: Throttle) -> list[Slot]:
    """All ranks: slots of any rank, in `layers`, without the weights that the placement in force says."""
    control, fingerprints = context.connections.control, context.fingerprints

    def corrupted_here() -> list[Slot]:
        found: list[Slot] = []
        at = context.weights, context.in_force.placement, context.topology, control.rank
        if fingerprints is not None:
            for layer in layers:
                found += fingerprints.wrong_slots(*at, [layer])
                throttle.pause()
        return found

    mine = control.attempt(phase, corrupted_here, TransferError)
    return sorted({slot for slots in control.collect(mine) for slot in slots})
