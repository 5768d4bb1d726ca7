"""One rebalance, from recorded loads to the placement in force: the same on all ranks, or nowhere.

Its phases are those of `PHASES`. Whatever fails on a rank before a hop is committed is told to all in a vote,
and all of them keep what they have. A rank that cannot be reached ends the balancing, see `RankLostError`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..config import PlannerOptions, RebalancerOptions
from ..errors import AgreementError, EplbError, LoadError, RankLostError, TransferError, UndecidedError
from ..metrics import balancedness
from ..placement import Placement
from ..planning.planner import plan
from ..topology import Topology
from ..window import LoadWindow
from .channels import Channels
from .collectives import fingerprint
from .dispatch import DispatchTables
from .fingerprints import ExpertFingerprints
from .hops import Hop, plan_hops
from .pace import Pace
from .reports import RebalanceReport
from .streams import DeviceOrder
from .transfer import Staging, Transfer
from .weights import ExpertWeights

__all__ = ["PHASES", "Outcome", "Parts", "Rebalance"]

PHASES = ("gather", "plan", "agree", "audit", "stage", "commit", "decided", "end")

_ATTEMPTS = 2  # times that an expert may arrive damaged from a source that is sound


@dataclass(frozen=True, eq=False, kw_only=True)
class Parts:
    """What every rebalance of a rank works with.

    Attributes:
        start: the placement that the loop starts from.
        fingerprints: of the weights; None where nothing is verified.
        switch: puts one layer in force: its row, int64 [slots], and what the tables prepared for it.
    """

    topology: Topology
    planner: PlannerOptions
    options: RebalancerOptions
    channels: Channels
    start: Placement
    window: LoadWindow
    weights: ExpertWeights
    fingerprints: ExpertFingerprints | None
    staging: Staging
    tables: DispatchTables
    order: DeviceOrder
    switch: Callable[[int, torch.Tensor, tuple[torch.Tensor, torch.Tensor]], None]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of a rebalance.

    Attributes:
        report: what it did.
        interval_load: [snapshots, layers, logical], tokens of the interval over all ranks.
        placement: the one in force from now on.
    """

    report: RebalanceReport
    interval_load: torch.Tensor
    placement: Placement


class Rebalance:
    """One rebalance on one rank; all ranks run theirs together.

    Args:
        parts: what it works with.
        number: which one it is, the same on every rank.
        step: steps that the rank had ended when the interval did.
        intervals: what this rank recorded in the intervals since the last rebalance, int64 [snapshots,
            layers, logical] each, tokens.
        placement: the one in force.
        pace: when to switch over.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        number: int,
        step: int,
        intervals: Sequence[torch.Tensor],
        placement: Placement,
        pace: Pace,
    ) -> None:
        self._parts = parts
        self._number = number
        self._step = step
        self._intervals = list(intervals)
        self._old = placement
        self._pace = pace
        self._now = placement.physical_to_logical.clone()
        self._interval_load = self._now.new_zeros(0, placement.num_layers, placement.num_logical)
        self._commits = 0
        self._moves = 0
        self._bytes = 0
        self._mismatches = 0
        self._notes: list[str] = []
        self._seconds = dict.fromkeys(("gather", "plan", "transfer", "commit"), 0.0)

    def run(self, ended: Callable[[Outcome], None]) -> None:
        """Go through all phases. `ended` gets the outcome, where and when the pace has commits done.

        Raises:
            RankLostError: a rank does not answer; layers have their old placement or their new one, alike on
                all ranks that answer. UndecidedError: what they have cannot be known here.
        """
        failed = False
        with self._parts.order.background():
            try:
                self._gather()
                self._move(self._plan())
            except RankLostError:
                raise
            except EplbError as error:
                failed = True
                self._notes.append(str(error))
            self._enter("end")
            outcome = self._outcome(failed)
            fence = self._pace.propose()
            last = max(self._parts.channels.control.vote(self._phase("ending"), value=fence))
        self._pace.release(last, [partial(ended, outcome)])

    def fill(self, held: torch.Tensor, goal: torch.Tensor) -> Outcome:
        """Bring a group to its first placement. All ranks call it.

        Args:
            held: int64 [layers, slots], what is where now; -1 where nothing is. Every expert occurs.
            goal: int64 [layers, slots].

        Raises:
            TransferError: on all ranks, when a layer could not be brought there. As `run`.
        """
        self._now = held.clone()
        with self._parts.order.background():
            self._move(goal.clone())
        if not torch.equal(self._now, goal):
            raise TransferError("; ".join(self._notes))
        return self._outcome(False)

    def _gather(self) -> None:
        """All ranks: sum what they recorded."""
        self._enter("gather")
        start = time.perf_counter()
        parts, control = self._parts, self._parts.channels.control
        parts.order.catch_up()
        loads: list[torch.Tensor] = []
        error = None
        try:
            loads = [self._checked(load) for load in self._intervals]
        except Exception as caught:
            error = caught
        snapshots = sum(load.shape[0] for load in loads)
        if len(set(control.vote(self._phase("taking the load"), error, snapshots))) > 1:
            raise AgreementError(f"ranks took part in different numbers of steps, here {snapshots} snapshots")
        parts.channels.decisions.forget(delete=control.rank == 0)
        for load in loads:
            parts.window.push(control.sum(load))
        if loads:
            self._interval_load = torch.cat(loads)
        self._seconds["gather"] = time.perf_counter() - start

    def _checked(self, load: torch.Tensor) -> torch.Tensor:
        load = load.cpu()
        if load.dtype != torch.int64 or load.shape[1:] != self._interval_load.shape[1:]:
            raise LoadError(
                f"the recorded load is {load.dtype} {tuple(load.shape)}, not int64 "
                f"[snapshots, {self._interval_load.shape[1]}, {self._interval_load.shape[2]}]"
            )
        if load.numel() and int(load.min()) < 0:
            raise LoadError(f"the recorded load holds {int(load.min())} tokens")
        return load

    def _plan(self) -> torch.Tensor:
        """All ranks: the rows to go to, int64 [layers, slots]; those in force where nothing was recorded."""
        self._enter("plan")
        start = time.perf_counter()
        parts, control = self._parts, self._parts.channels.control
        load = parts.window.load()
        if not bool(load.any()):
            self._notes.append("no load was recorded")
            return self._now.clone()
        layers = self._old.num_layers
        leader = parts.options.planning == "leader"
        share = layers if leader else -(-layers // control.size)
        first = min(control.rank * share, layers)
        last = min(first + share, layers)
        rows = torch.zeros(share, parts.topology.num_slots, dtype=torch.int64)

        def work() -> None:
            if first < last:
                current = Placement(self._now[first:last], self._old.num_logical)
                planned = plan(load[:, first:last], parts.topology, current, parts.planner)
                rows[: last - first] = planned.placement.physical_to_logical

        control.attempt(self._phase("planning"), work)
        self._enter("agree")
        rows = control.broadcast(rows) if leader else control.all_gather(rows).flatten(0, 1)[:layers]
        control.agree("the plan", fingerprint(rows))
        Placement(rows, self._old.num_logical)  # raises on all ranks alike
        if torch.equal(rows, self._now):
            self._notes.append(f"no layer gains min_gain={parts.planner.min_gain}")
        self._seconds["plan"] = time.perf_counter() - start
        return rows

    def _move(self, goal: torch.Tensor) -> None:
        """All ranks: move weights and switch over, hop by hop. What turns out damaged is replaced."""
        parts = self._parts
        held = self._now.clone()
        damaged = self._audit()
        self._exclude(held, goal, damaged)
        attempts: dict[int, int] = {}
        while True:
            hops, impossible = plan_hops(
                held, goal, parts.weights, parts.topology, parts.options.staging_mib << 20
            )
            for layer, reason in impossible.items():
                self._keep(layer, held, goal, reason)
            for hop in hops:
                transfer, bad = self._stage(hop)
                if bad:
                    self._exclude(held, goal, self._trace_back(bad, attempts, held, goal))
                    break
                self._commit(hop, transfer)
                held[hop.layers] = hop.after
            else:
                return

    def _audit(self) -> list[tuple[int, int]]:
        """All ranks: (layer, slot) of what does not hold what it should, found by comparing fingerprints."""
        prints = self._parts.fingerprints
        if prints is None:
            return []
        self._enter("audit")
        placement = Placement(self._now, self._old.num_logical)
        control, weights, topology = self._parts.channels.control, self._parts.weights, self._parts.topology
        self._parts.order.catch_up()
        return self._shared(
            "comparing fingerprints",
            lambda: prints.wrong_slots(weights, placement, topology, control.rank),
        )

    def _shared(self, phase: str, find: Callable[[], list[tuple[int, int]]]) -> list[tuple[int, int]]:
        """All ranks: what any of them found, on every one of them."""
        control = self._parts.channels.control
        found: list[tuple[int, int]] = []
        error = None
        try:
            found = find()
        except Exception as caught:
            error = caught
        if not any(control.vote(self._phase(phase), error, len(found), TransferError)):
            return []
        return sorted({item for items in control.collect(found) for item in items})

    def _exclude(self, held: torch.Tensor, goal: torch.Tensor, damaged: Sequence[tuple[int, int]]) -> None:
        """Take damaged slots for empty ones, so that they are filled from sound replicas."""
        self._mismatches += len(damaged)
        for layer, slot in damaged:
            held[layer, slot] = -1
        for layer in sorted({layer for layer, _ in damaged}):
            there = set(held[layer].tolist())
            missing = [expert for expert in range(self._old.num_logical) if expert not in there]
            if missing:
                self._keep(layer, held, goal, f"experts {missing} of layer {layer} have no sound replica")

    def _keep(self, layer: int, held: torch.Tensor, goal: torch.Tensor, reason: str) -> None:
        """Leave a layer as it is in force now."""
        held[layer] = goal[layer] = self._now[layer]
        self._notes.append(reason)

    def _stage(self, hop: Hop) -> tuple[Transfer, list[tuple[int, int]]]:
        """All ranks: get all that the hop needs; (layer, source slot) of what arrived damaged on any."""
        self._enter("stage")
        start = time.perf_counter()
        parts, channels = self._parts, self._parts.channels
        migration = hop.migration(parts.topology)
        transfer = Transfer(hop, migration, parts.weights, parts.topology, channels.control.rank)
        parts.order.catch_up()

        def prepare() -> None:
            device = parts.weights.device or channels.data.device
            transfer.prepare(parts.staging.reserve(transfer.num_bytes, device))

        channels.control.attempt(self._phase("staging expert weights"), prepare, TransferError)
        transfer.exchange(channels.data)
        parts.order.settle()

        def check() -> list[tuple[int, int]]:
            prints = parts.fingerprints
            return [
                (arrival.layer, arrival.source_slot)
                for arrival in transfer.arrivals
                if prints is not None and not prints.matches(arrival.layer, arrival.expert, arrival.rows)
            ]

        bad = self._shared("checking expert weights", check)
        if not bad:
            self._moves += migration.num_sends
            self._bytes += sum(
                parts.weights.expert_bytes(hop.layers[layer]) for layer in migration.sends.layer.tolist()
            )
        self._seconds["transfer"] += time.perf_counter() - start
        return transfer, bad

    def _trace_back(
        self,
        bad: Sequence[tuple[int, int]],
        attempts: dict[int, int],
        held: torch.Tensor,
        goal: torch.Tensor,
    ) -> list[tuple[int, int]]:
        """All ranks: those of `bad` that are damaged where they came from; the others were on the way."""
        parts, control = self._parts, self._parts.channels.control
        prints = parts.fingerprints
        assert prints is not None
        suspects = sorted({layer for layer, _ in bad})
        placement = Placement(self._now, self._old.num_logical)
        confirmed = self._shared(
            "looking for the damage",
            lambda: prints.wrong_slots(parts.weights, placement, parts.topology, control.rank, suspects),
        )
        known = {(layer, slot) for layer, slot in confirmed if held[layer, slot] < 0}
        for layer in sorted({layer for layer, slot in bad if (layer, slot) not in confirmed}):
            self._mismatches += 1
            attempts[layer] = attempts.get(layer, 0) + 1
            if attempts[layer] >= _ATTEMPTS:
                self._keep(layer, held, goal, f"experts of layer {layer} arrive damaged again and again")
        return [item for item in confirmed if item not in known]

    def _commit(self, hop: Hop, transfer: Transfer) -> None:
        """All ranks: switch over, in the same step, if all are ready."""
        self._enter("commit")
        parts, channels = self._parts, self._parts.channels
        after = self._now.clone()
        after[hop.layers] = hop.after
        tables = parts.tables.prepare(Placement(after, self._old.num_logical), hop.layers)

        def switch(layers: Sequence[int]) -> None:
            try:
                for layer in layers:
                    transfer.commit(layer)
                    self._now[layer] = after[layer]
                    parts.switch(layer, after[layer], tables[layer])
            except Exception as error:
                raise UndecidedError(f"layers {layers} did not switch over on this rank: {error}") from error
            parts.order.mark()

        size = parts.options.commit_layers
        groups = [hop.layers[at : at + size] for at in range(0, len(hop.layers), size)]
        fence = self._pace.propose()
        lost: RankLostError | None = None
        try:
            proposal = str(max(channels.control.vote(self._phase("switching over"), value=fence)))
        except RankLostError as error:
            # Others may have every vote, so this rank has to ask what became of it.
            proposal, lost = "keep", error
        self._commits += 1
        decision = channels.decisions.decide(f"{self._number}/{self._commits}", proposal)
        self._enter("decided")
        if decision == "keep":
            raise lost or RankLostError("a rank could not be reached when all were ready to switch over")
        self._seconds["commit"] += self._pace.release(
            int(decision), [partial(switch, layers) for layers in groups]
        )
        if lost is not None:
            raise lost

    def _outcome(self, failed: bool) -> Outcome:
        old = self._old
        new = Placement(self._now, old.num_logical)
        layers = int((self._now != old.physical_to_logical).any(1).sum())
        seconds = self._seconds
        report = RebalanceReport(
            step=self._step,
            skipped=not layers,
            reason="; ".join(self._notes),
            failed=failed,
            balancedness_before=self._balancedness(old),
            balancedness_after=self._balancedness(new),
            layers=layers,
            moves=self._moves,
            bytes_moved=self._bytes,
            mismatches=self._mismatches,
            gather_seconds=seconds["gather"],
            plan_seconds=seconds["plan"],
            transfer_seconds=seconds["transfer"],
            commit_seconds=seconds["commit"],
        )
        return Outcome(report, self._interval_load, new)

    def _balancedness(self, placement: Placement) -> float:
        if not self._interval_load.shape[0]:
            return 1.0
        return balancedness(self._interval_load, placement, self._parts.topology)

    def _phase(self, name: str) -> str:
        return f"{name} in rebalance {self._number}"

    def _enter(self, phase: str) -> None:
        """A phase begins. Tests have ranks fail here."""
