"""Damaged weights: found by their fingerprints, told to all ranks, and replaced from sound replicas."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..core.errors import TransferError
from ..core.placement import Placement
from .context import Parts
from .weights.staging import Arrival

__all__ = ["Damage"]

Place = tuple[int, int]
"""(layer, slot), slots numbered over all ranks."""

Rest = Callable[[], None]
"""Called between pieces of work."""

_ATTEMPTS = 2  # times that experts of a layer may arrive damaged from sources that are sound
_TURNS = 8  # rebalances in which every slot is looked at once


class Damage:
    """What one rebalance finds, alike on all ranks.

    Args:
        parts: of the rank.
        number: of the rebalance.
        num_logical: experts of a layer.

    Attributes:
        mismatches: how many times a fingerprint was wrong.
    """

    def __init__(self, parts: Parts, number: int, num_logical: int) -> None:
        self._parts = parts
        self._number = number
        self._num_logical = num_logical
        self._attempts: dict[int, int] = {}
        self.mismatches = 0

    def audit(self, now: torch.Tensor, rest: Rest) -> list[Place]:
        """All ranks: slots that do not hold what `now` says, of an eighth of the layers in turn."""
        layers = range(self._number % _TURNS, len(now), _TURNS)
        return self._everywhere("comparing fingerprints", lambda: self._wrong_here(now, layers, rest))

    def arrived_damaged(self, arrivals: Sequence[Arrival], rest: Rest) -> list[Place]:
        """This rank: where arrivals came from whose fingerprint is wrong."""
        prints = self._parts.fingerprints
        wrong = [] if prints is None else prints.wrong_arrivals(arrivals, rest)
        return [(arrival.layer, arrival.source_slot) for arrival in wrong]

    def trace_back(self, mine: Sequence[Place], now: torch.Tensor) -> tuple[list[Place], list[int]]:
        """All ranks, when experts arrived damaged on any.

        Args:
            mine: where this rank's damaged arrivals came from.
            now: int64 [layers, slots], the placement in force.

        Returns:
            Slots that are damaged themselves; layers whose experts were damaged on their way too often.
        """
        control = self._parts.channels.control
        bad = {place for places in control.collect(list(mine)) for place in places}
        layers = sorted({layer for layer, _ in bad})
        slots = self._everywhere("looking for the damage", lambda: self._wrong_here(now, layers))
        given_up = []
        for layer in sorted({layer for layer, slot in bad if (layer, slot) not in slots}):
            self.mismatches += 1
            self._attempts[layer] = self._attempts.get(layer, 0) + 1
            if self._attempts[layer] >= _ATTEMPTS:
                given_up.append(layer)
        return slots, given_up

    def empty(self, held: torch.Tensor, slots: Sequence[Place]) -> dict[int, list[int]]:
        """Take damaged slots for empty ones, so that they are filled from sound replicas.

        Args:
            held: int64 [layers, slots], written.

        Returns:
            For each layer with experts that have no sound replica: these experts.
        """
        new = [place for place in slots if int(held[place]) >= 0]
        self.mismatches += len(new)
        for place in new:
            held[place] = -1
        lost = {}
        for layer in sorted({layer for layer, _ in new}):
            there = set(held[layer].tolist())
            missing = [expert for expert in range(self._num_logical) if expert not in there]
            if missing:
                lost[layer] = missing
        return lost

    def _wrong_here(self, now: torch.Tensor, layers: Sequence[int], rest: Rest = lambda: None) -> list[Place]:
        prints = self._parts.fingerprints
        if prints is None:
            return []
        parts = self._parts
        placement = Placement(now, self._num_logical)
        return prints.wrong_slots(
            parts.weights, placement, parts.topology, parts.channels.control.rank, layers, rest
        )

    def _everywhere(self, phase: str, find: Callable[[], list[Place]]) -> list[Place]:
        """All ranks: what any of them finds."""
        control = self._parts.channels.control
        found = control.attempt(f"{phase} in rebalance {self._number}", find, TransferError)
        return sorted({place for places in control.collect(found) for place in places})
