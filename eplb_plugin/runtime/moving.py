"""From one placement to another, hop by hop: staged on all ranks, checked, and committed on all or none."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from ..errors import RankLostError, TransferError, UndecidedError
from ..placement import Placement
from .hops import Hop, plan_hops
from .pace import Pace
from .parts import Parts
from .repair import Damage
from .transfer import Transfer

__all__ = ["Move"]


class Move:
    """The way of all ranks to a new placement; all ranks make it together.

    Args:
        parts: of the rank.
        number: of the rebalance.
        now: int64 [layers, slots], what is in force; -1 where nothing is yet.
        num_logical: experts of a layer.
        pace: when to switch over.
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
        self._num_logical = num_logical
        self._pace = pace
        self._enter = enter
        self._commits = 0
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
            TransferError: on all ranks, when one of them failed before a hop was committed; hops before that
                stay. RankLostError: another rank does not answer. UndecidedError: see there.
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
            hops, impossible = plan_hops(held, goal, parts.weights, parts.topology, bound)
            for layer, reason in impossible.items():
                keep(layer, reason)
            for hop in hops:
                bad = self._hop(hop)
                if bad is not None:
                    slots, given_up = self.damage.trace_back(bad, self.now)
                    for layer in given_up:
                        keep(layer, f"experts of layer {layer} were damaged on their way more than once")
                    set_aside(slots)
                    break
                held[hop.layers] = hop.after
            else:
                return

    def _hop(self, hop: Hop) -> list[tuple[int, int]] | None:
        """All ranks: None when it is done; else nothing has changed, since experts arrived damaged on some
        rank: where those on this rank came from."""
        self._enter("stage")
        start = time.perf_counter()
        parts, channels = self._parts, self._parts.channels
        transfer = Transfer(hop, parts.weights, parts.topology, channels.control.rank)
        device = parts.weights.device or channels.data.device
        after = self.now.clone()
        after[hop.layers] = hop.after
        parts.order.catch_up()

        def prepare() -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
            transfer.prepare(parts.staging.reserve(transfer.num_bytes, device))
            return parts.tables.prepare(Placement(after, self._num_logical), hop.layers)

        phase = f"hop {self._commits + 1} in rebalance {self._number}"
        tables = channels.control.attempt(f"staging expert weights, {phase}", prepare, TransferError)
        transfer.exchange(channels.data)
        parts.order.settle()
        bad: list[tuple[int, int]] = []
        error: Exception | None = None
        try:
            bad = self.damage.arrived_damaged(transfer.arrivals)
        except Exception as caught:  # every kind, since the other ranks wait
            error = caught
        self.transfer_seconds += time.perf_counter() - start

        def switch(layers: Sequence[int]) -> None:
            try:
                for layer in layers:
                    transfer.commit(layer)
                    self.now[layer] = after[layer]
                    parts.switch(layer, after[layer], tables[layer])
            except Exception as failure:
                raise UndecidedError(
                    f"layers {layers} did not switch over on this rank: {failure}"
                ) from failure
            parts.order.mark()

        size = parts.options.commit_layers
        groups = [hop.layers[at : at + size] for at in range(0, len(hop.layers), size)]
        if not self._commit(phase, bad, error, [partial(switch, layers) for layers in groups]):
            return bad
        self.moves += len(transfer.sends)
        self.num_bytes += sum(parts.weights.expert_bytes(layer) for layer in transfer.sends)
        return None

    def _commit(
        self,
        phase: str,
        bad: Sequence[tuple[int, int]],
        error: Exception | None,
        commits: Sequence[Callable[[], None]],
    ) -> bool:
        """All ranks: switch over in the same step, if all are ready; whether that was done."""
        self._enter("commit")
        channels = self._parts.channels
        fence = self._pace.propose()
        lost: RankLostError | None = None
        try:
            # A rank with damaged arrivals is not ready: it proposes no step.
            steps = channels.control.vote(
                f"switching over, {phase}", error, -1 if bad else fence, TransferError
            )
            proposal = str(max(steps)) if min(steps) >= 0 else "keep"
        except TransferError:
            self._pace.release(None)
            raise
        except RankLostError as caught:
            # Others may have every vote, so this rank has to ask what became of it.
            proposal, lost = "keep", caught
        if proposal == "keep" and lost is None:
            self._pace.release(None)
            return False
        self._commits += 1
        decision = channels.decisions.decide(f"{self._number}/{self._commits}", proposal)
        self._enter("decided")
        if decision == "keep":
            raise lost or RankLostError("a rank could not be reached when all were ready to switch over")
        self.commit_seconds += self._pace.release(int(decision), commits)
        if lost is not None:
            raise lost
        return True
