"""A small model served on the ranks of a cluster, compared with one process and with its placement always."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

import eplb_plugin as eplb
from eplb_plugin.integration.torch_moe import MoEConfig, MoEModel
from eplb_plugin.runtime.control.rank_group import content_hash
from eplb_plugin.runtime.rebalancer import Rebalancer, RebalanceReport
from tests.faults.cluster import Seat

SMALL = MoEConfig(vocab=64, num_topics=4, hidden=16, expert_hidden=24, num_layers=3, num_logical=12, top_k=3)
SIZE = 3
SLOTS_PER_RANK = 6
# Moves are free and no gain is too small, so that nearly every rebalance moves something.
PLANNER = eplb.PlannerOptions(min_gain=0, move_price=0)
INTERVAL = 4
MOST = 12  # rebalances until one does what a test is about
AT_ONCE = 2.0  # seconds that a step may take, on a busy machine, when there is nothing to do in it


@dataclass(frozen=True)
class Survivor:
    """What a rank is left with.

    Attributes:
        rows: its placement.
        changed: whether that is another one than before the fault.
        off: why it balances no more.
        seconds: from the fault until it knew.
        undecided: whether it may not serve on.
    """

    rows: list[list[int]]
    changed: bool
    off: str
    seconds: float
    undecided: bool


class Service:
    """One rank's part of the model, with all that each step is checked against.

    Args:
        seat: of this rank.
        config: of the model.
        slots_per_rank: of the topology.
        options: of the rebalancer.
    """

    def __init__(
        self, seat: Seat, config: MoEConfig = SMALL, slots_per_rank: int = SLOTS_PER_RANK, **options: object
    ) -> None:
        self.seat = seat
        self.config = config
        # Pauses would make these tests long; `test_async.py` has them.
        chosen = {"interval": INTERVAL, "history": 1, "time_limit": 20.0, "background_share": 1.0} | options
        self.topology = eplb.Topology(num_ranks=seat.size, num_slots=seat.size * slots_per_rank)
        self.model = MoEModel(
            config, self.topology, options=eplb.RebalancerOptions(**chosen), planner=PLANNER
        )
        self.reference = MoEModel(config)
        self.steps = 0
        self.topic = 0
        self.off_at: float | None = None

    @property
    def balancer(self) -> Rebalancer:
        return self.model.rebalancer

    def step(self, *, sound: bool = True, topic: int | None = None) -> RebalanceReport | None:
        """One forward step on all ranks.

        Args:
            sound: with weights as they should be, so that outputs agree.
            topic: of the tokens; None is another one in each interval.
        """
        self.topic = self.steps // self.balancer.options.interval if topic is None else topic
        if sound:
            self.check_outputs()
        else:
            self.model.forward(self._batch())
        report = self.model.step()
        if self.balancer.off and self.off_at is None:
            self.off_at = time.monotonic()
        self.steps += 1
        if sound:
            self.check_weights()
        self.check_tables()
        self._check_alike()
        return report

    def serve(self, reports: int, *, sound: bool = True, most: int = 400) -> list[RebalanceReport]:
        """Step until so many rebalances have ended, and the next one has not begun."""
        found: list[RebalanceReport] = []
        for _ in range(most):
            report = self.step(sound=sound)
            if report is not None:
                found.append(report)
            # One that began in this very step would be under way already.
            if report is not None and len(found) >= reports and self.steps % self.balancer.options.interval:
                return found
            if self.balancer.options.mode == "sync" and len(found) >= reports:
                return found
        raise AssertionError(f"{len(found)} of {reports} rebalances in {most} steps")

    def until(self, wanted: Callable[[RebalanceReport], bool], *, sound: bool = True) -> RebalanceReport:
        """Serve until a rebalance was as wanted; where several have ended, it need not be the last."""
        reports: list[RebalanceReport] = []
        for _ in range(MOST):
            reports = self.serve(1, sound=sound)
            for report in reports:
                if wanted(report):
                    return report
        raise AssertionError(reports)

    def check_outputs(self) -> None:
        """A forward pass on all ranks gives what it gives on one process."""
        tokens = self._batch()
        logits, expected = self.model.forward(tokens), self.reference.forward(tokens)
        assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-5), f"outputs of step {self.steps}"
        assert torch.equal(logits.argmax(-1), expected.argmax(-1)), f"tokens of step {self.steps}"

    def check_weights(self) -> None:
        """Every slot of this rank holds what the placement says, to the bit."""
        assert self.model.wrong_slots() == 0, f"step {self.steps}, {self.balancer.placement}"

    def check_tables(self) -> None:
        """Tokens go where the placement says."""
        now, tables = self.balancer.placement, self.balancer.tables
        now.validate(self.topology)
        width = now.logical_to_physical.shape[2]
        assert torch.equal(tables.logical_to_physical[:, :, :width], now.logical_to_physical)
        assert bool((tables.logical_to_physical[:, :, width:] == -1).all())
        assert torch.equal(tables.replica_count, now.replica_count)
        ids = torch.arange(self.config.num_logical)
        for layer, row in enumerate(now.physical_to_logical):
            assert torch.equal(row[self.balancer.physical(layer, ids)], ids)

    def outlive(self, within: float, *, left_over: str = "") -> Survivor:
        """Go on until the balancing is off or undecided, without the model where a rank of it is gone.

        Args:
            within: seconds from the fault.
            left_over: name of threads of the balancer's that may still be there in the end.
        """
        before = self.balancer.placement
        deadline = time.monotonic() + within
        together, undecided = True, False
        while not self.balancer.off:
            fault = self.seat.marked("fault")
            assert time.monotonic() < (deadline if fault is None else fault + within), "still on"
            if together:
                try:
                    self.check_outputs()
                except RuntimeError:
                    together = False
            if not together:
                # What an engine would do next is its own affair; the balancer has to cope with any of it.
                time.sleep(0.005)
                for layer in range(self.config.num_layers):
                    self.balancer.record_counts(layer, torch.arange(self.config.num_logical))
            try:
                self.balancer.step()
            except eplb.UndecidedError:
                undecided = True
                # It serves no more, which the others have to notice as if the process had ended.
                dist.destroy_process_group()
            self.steps += 1
        seconds = time.monotonic() - (self.seat.marked("fault") or 0.0)
        self._check_off(undecided, left_over)
        if not undecided:
            self.check_weights()
            self.check_tables()
        now = self.balancer.placement
        return Survivor(
            now.physical_to_logical.tolist(), now != before, self.balancer.off, seconds, undecided
        )

    def _check_off(self, undecided: bool, left_over: str) -> None:
        """A step costs nothing any more, one error was logged, and no thread of the balancer's is left."""
        start = time.monotonic()
        for _ in range(3):
            try:
                assert self.balancer.step() is None
                assert not undecided
            except eplb.UndecidedError:
                assert undecided
        assert time.monotonic() - start < AT_ONCE
        assert len(self.seat.logged) == 1, self.seat.logged
        # A thread that asks the store may have been given up on, and ends when the store's client does.
        deadline = time.monotonic() + 2 * self.balancer.options.time_limit + AT_ONCE
        while left := {t.name for t in threading.enumerate() if t.name.startswith("eplb-")} - {left_over}:
            assert time.monotonic() < deadline, left
            time.sleep(0.01)

    def _check_alike(self) -> None:
        """Called by all ranks after the same step: they have one placement."""
        mine = torch.tensor([content_hash(self.balancer.placement.physical_to_logical)])
        held = [torch.empty_like(mine) for _ in range(self.seat.size)]
        dist.all_gather(held, mine)
        assert all(torch.equal(other, mine) for other in held), f"placements differ after step {self.steps}"

    def _batch(self) -> torch.Tensor:
        """Token ids of a topic that changes with every interval; now and then there are none on rank 1."""
        generator = torch.Generator().manual_seed(self.steps * 10 + self.seat.rank)
        tokens = 0 if self.seat.rank == 1 and self.steps % 7 == 3 else 20 + 5 * self.seat.rank
        topic = self.topic % self.config.num_topics
        width = self.config.vocab // self.config.num_topics
        ids = torch.randint(width, (tokens,), generator=generator)
        return ids * self.config.num_topics + topic
