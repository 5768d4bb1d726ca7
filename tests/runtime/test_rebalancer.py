"""The online loop on real processes: same plan everywhere, weights where it says, and nothing half done."""

from __future__ import annotations

import logging
import re
from unittest import mock

import pytest
import torch

import eplb_plugin as eplb
from eplb_plugin.planning.planner import plan
from eplb_plugin.runtime import rebalance as phases
from eplb_plugin.runtime import rebalancer as loop
from eplb_plugin.runtime.control.rank_group import RankGroup
from eplb_plugin.runtime.rebalancer import Rebalancer, RebalanceReport
from eplb_plugin.runtime.weights.transport import Message, Transport
from tests.processes import RanksFailedError, run_ranks
from tests.runtime.cases import fill, wrong_rows

LAYERS, LOGICAL = 3, 16
# A fixed price: measured times would make a difference between two runs.
FAST = eplb.PlannerOptions(min_gain=0, move_price=0.009)
HIERARCHICAL = eplb.Topology(num_nodes=2, num_ranks=4, num_slots=24, num_groups=4)
GLOBAL = eplb.Topology(num_ranks=4, num_slots=24)
PAIR = eplb.Topology(num_ranks=2, num_slots=20)
ALONE = eplb.Topology(num_ranks=1, num_slots=20)


def counts(step: int, rank: int, layer: int) -> torch.Tensor:
    """Loads whose hot experts change with the step: int64 [logical], tokens."""
    generator = torch.Generator().manual_seed(step // 2 * 10_000 + layer)
    hot = torch.empty(LOGICAL).log_normal_(3, 1.0, generator=generator)
    return (hot * (1 + rank)).long()


def summed(step: int, layer: int) -> torch.Tensor:
    """The same over four ranks."""
    return torch.stack([counts(step, rank, layer) for rank in range(4)]).sum(0)


def options(**changes: object) -> eplb.RebalancerOptions:
    return eplb.RebalancerOptions(**{"mode": "sync", "interval": 2, "snapshots": 2, "history": 1} | changes)


def make_weights(topology: eplb.Topology, rank: int) -> list[list[torch.Tensor]]:
    spr = topology.slots_per_rank
    weights = [
        [
            torch.empty(spr, 6, 5, dtype=torch.bfloat16),
            torch.empty(spr, 3),
            torch.empty(spr, dtype=torch.int8),
        ]
        for _ in range(LAYERS)
    ]
    start = eplb.Placement.default(LAYERS, LOGICAL, topology.num_slots)
    for layer in range(LAYERS):
        fill(weights[layer], layer, start.physical_to_logical[layer, topology.slots_of_rank(rank)].tolist())
    return weights


def serve(balancer: Rebalancer, steps: int, rank: int) -> list[RebalanceReport]:
    reports = []
    for step in range(steps):
        for layer in range(LAYERS):
            balancer.record_counts(layer, counts(step, rank, layer))
        report = balancer.step()
        assert (report is None) == ((step + 1) % balancer.options.interval != 0)
        if report:
            reports.append(report)
    return reports


def many_rebalances(rank: int, topology: eplb.Topology, planning: str) -> tuple[list[object], object]:
    weights = make_weights(topology, rank)
    balancer = Rebalancer(
        topology, LAYERS, LOGICAL, weights=weights, options=options(planning=planning), planner=FAST
    )
    mine = topology.slots_of_rank(rank)
    maps: list[object] = []
    for interval in range(20):
        old = balancer.placement
        for step in (2 * interval, 2 * interval + 1):
            for layer in range(LAYERS):
                balancer.record_counts(layer, counts(step, rank, layer))
            report = balancer.step()
        assert report is not None
        new = balancer.placement
        assert wrong_rows(weights, new, mine) == []
        width = new.logical_to_physical.shape[2]
        assert torch.equal(balancer.tables.logical_to_physical[:, :, :width], new.logical_to_physical)
        moves = eplb.count_moves(old, new, topology)
        assert report.moves == int(moves.sum())
        assert report.bytes_moved == report.moves * (60 + 12 + 1)
        load = torch.stack(
            [
                torch.stack(
                    [sum(counts(2 * interval + s, r, layer) for r in range(4)) for layer in range(LAYERS)]
                )
                for s in (0, 1)
            ]
        )
        assert report.balancedness_before == eplb.balancedness(load, old, topology)
        assert report.balancedness_after == eplb.balancedness(load, new, topology)
        maps.append(new.physical_to_logical.tolist())
    assert len(balancer.reports) == 20
    assert sum(report.moves for report in balancer.reports) > 0
    return maps, [(r.step, r.skipped, r.layers, r.moves, r.balancedness_after) for r in balancer.reports]


@pytest.mark.parametrize("topology", [HIERARCHICAL, GLOBAL], ids=["hierarchical", "global"])
def test_twenty_rebalances_leader_and_sharded_alike(topology: eplb.Topology) -> None:
    leader = run_ranks(many_rebalances, 4, topology, "leader")
    sharded = run_ranks(many_rebalances, 4, topology, "sharded")
    assert all(result == leader[0] for result in leader + sharded)


def trouble(rank: int) -> None:
    """On one pair of processes: a planner that raises, ranks that disagree, dummy steps, wrong set-ups."""
    weights = make_weights(PAIR, rank)
    mine = PAIR.slots_of_rank(rank)

    def fresh(**changes: object) -> Rebalancer:
        return Rebalancer(PAIR, LAYERS, LOGICAL, options=options(**changes), planner=FAST)

    # A planner that raises on one rank: told on all, logged once, and the next interval works.
    balancer = Rebalancer(
        PAIR, LAYERS, LOGICAL, weights=weights, options=options(planning="sharded"), planner=FAST
    )
    start = balancer.placement
    broken = mock.Mock(side_effect=ValueError("no plan today")) if rank == 1 else plan
    with mock.patch.object(phases, "plan", broken), mock.patch.object(logging.Logger, "error") as logged:
        reports = serve(balancer, 4, rank)
    assert [r.reason for r in reports] == [
        f"planning in rebalance {n} failed on 1 of 2 ranks: rank 1: ValueError: no plan today" for n in (1, 2)
    ]
    assert all(r.failed for r in reports)
    assert all(r.skipped and not r.moves and r.balancedness_after == r.balancedness_before for r in reports)
    assert logged.call_count == 1
    assert balancer.placement == start
    assert serve(balancer, 2, rank)[0].moves > 0
    assert wrong_rows(weights, balancer.placement, mine) == []

    # The same where rank 0 alone plans.
    balancer = fresh()
    broken = mock.Mock(side_effect=ValueError("no plan today")) if rank == 0 else plan
    with mock.patch.object(phases, "plan", broken):
        assert "rank 0: ValueError: no plan today" in serve(balancer, 2, rank)[0].reason

    # Ranks that end up with different maps: all say so, naming who holds what; nothing moved.
    balancer = fresh()
    start = balancer.placement
    received = RankGroup.broadcast

    def garbled(self: RankGroup, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        tensor = received(self, tensor, source)
        return tensor.flip(1) if rank == 1 else tensor

    with mock.patch.object(RankGroup, "broadcast", garbled):
        report = serve(balancer, 2, rank)[0]
    assert report.failed
    assert re.fullmatch(
        r"ranks disagree on the plan: .* on ranks \[[01]\]; .* on ranks \[[01]\]", report.reason
    )
    assert balancer.placement == start
    assert serve(balancer, 2, rank)[0].moves > 0

    # A rank with dummy steps only still takes part; what it recorded does not count.
    balancer = fresh()
    for step in range(2):
        for layer in range(LAYERS):
            balancer.record_counts(
                layer, counts(step, 0, layer) if rank == 0 else torch.full((LOGICAL,), 10**6)
            )
        report = balancer.step(is_dummy=rank == 1)
    assert report is not None
    expected = torch.stack(
        [torch.stack([counts(step, 0, layer) for layer in range(LAYERS)]) for step in range(2)]
    )
    assert torch.equal(balancer.window.load(), expected)

    # Set-ups that do not fit end on both ranks.
    with pytest.raises(eplb.TopologyError, match="num_ranks=4, the group 2"):
        Rebalancer(GLOBAL, LAYERS, LOGICAL)
    with pytest.raises(eplb.AgreementError, match="topology, model and options"):
        fresh(interval=2 + rank)
    with pytest.raises(eplb.AgreementError, match="topology, model and options"):
        Rebalancer(PAIR, LAYERS, LOGICAL + rank, placement=torch.arange(20).expand(LAYERS, 20) % LOGICAL)
    with pytest.raises(eplb.EplbError, match="num_logical=21" if rank else r"ranks \[1\] cannot take part"):
        Rebalancer(PAIR, LAYERS, LOGICAL + 5 * rank)
    ids = start.physical_to_logical.flip(1) if rank else start.physical_to_logical
    with pytest.raises(eplb.AgreementError, match="placement at the start"):
        Rebalancer(PAIR, LAYERS, LOGICAL, placement=eplb.Placement(ids, LOGICAL))
    with pytest.raises(eplb.AgreementError, match="whether there are weights to move"):
        Rebalancer(PAIR, LAYERS, LOGICAL, weights=weights if rank else None)
    with pytest.raises(eplb.AgreementError, match="structure of the expert weights"):
        Rebalancer(PAIR, LAYERS, LOGICAL, weights=[[torch.zeros(10, 2 + rank)] for _ in range(LAYERS)])
    with pytest.raises(eplb.EplbError, match="registration failed on 1 of 2 ranks: rank 1: TransferError"):
        Rebalancer(PAIR, LAYERS, LOGICAL, weights=[[torch.zeros(10 - rank, 2)] for _ in range(LAYERS)])


def test_trouble_reaches_all_ranks_alike() -> None:
    run_ranks(trouble, 2)


def close_and_vote(rank: int) -> None:
    """A closed group is not a lone rank, whose votes would all succeed."""
    group = RankGroup()
    transport = Transport(group)
    transport.close()
    group.group = None
    messages = [Message(1 - rank, torch.zeros(1))]
    for say in (group.sum, group.broadcast, group.all_gather):
        with pytest.raises(eplb.RankLostError, match="closed"):
            say(torch.zeros(1))
    with pytest.raises(eplb.RankLostError, match="closed"):
        group.vote("closing")
    with pytest.raises(eplb.RankLostError, match="closed"):
        transport.start(messages, messages)


def test_nothing_is_agreed_on_over_closed_connections() -> None:
    run_ranks(close_and_vote, 2)


def hang(rank: int) -> None:
    if rank == 1:
        raise ValueError("on purpose")
    torch.distributed.barrier()


def test_the_launcher_reports_the_rank_that_failed() -> None:
    with pytest.raises(RanksFailedError, match="ValueError: on purpose") as caught:
        run_ranks(hang, 2, timeout=20)
    assert "on purpose" in caught.value.failures[1]


def alone(**changes: object) -> Rebalancer:
    return Rebalancer(ALONE, LAYERS, LOGICAL, options=options(**changes), planner=FAST)


def test_one_rank_without_a_group() -> None:
    balancer = alone()
    assert serve(balancer, 1, 0) == []
    ids = torch.tensor([[0, 5], [7, -1]])
    slots = balancer.physical(1, ids)
    assert slots[1, 1] == -1
    assert balancer.placement.physical_to_logical[1][slots[0]].tolist() == [0, 5]
    report = balancer.rebalance()
    assert report.step == 1
    assert report.balancedness_before == report.balancedness_after == 1.0
    assert report.bytes_moved == report.moves == 0


def test_without_load_nothing_is_planned() -> None:
    with mock.patch.object(phases, "plan") as planned:
        balancer = alone()
        forced = balancer.rebalance()
        balancer.step()
        report = balancer.step()
    assert not planned.called
    assert report is not None
    for skipped in (forced, report):
        assert skipped.skipped
        assert skipped.reason == "no load was recorded"


def test_layers_that_gain_too_little_stay() -> None:
    # Layer 0 is balanced already; layer 1 has all its load on rank 0; layer 2 has no load.
    topology = eplb.Topology(num_ranks=2, num_slots=4)
    rows = torch.tensor([[0, 1, 2, 3]] * 3)
    loads = torch.tensor([[10, 10, 10, 10], [50, 50, 0, 0], [0, 0, 0, 0]])

    def run(min_gain: float) -> tuple[Rebalancer, RebalanceReport]:
        # Two ranks on paper: planning for them needs no second process.
        with mock.patch.object(loop.RankGroup, "check_topology"):
            balancer = Rebalancer(
                topology,
                3,
                4,
                placement=eplb.Placement(rows, 4),
                options=options(),
                planner=FAST.model_copy(update={"min_gain": min_gain}),
            )
        for layer in range(3):
            balancer.record_counts(layer, loads[layer])
        balancer.step()
        return balancer, balancer.rebalance()

    balancer, report = run(0.01)
    assert report.layers == 1
    assert not report.skipped
    assert balancer.placement.physical_to_logical[0].tolist() == [0, 1, 2, 3]
    assert balancer.placement.physical_to_logical[2].tolist() == [0, 1, 2, 3]
    assert report.balancedness_before == pytest.approx((20 + 50) / (20 + 100))
    assert report.balancedness_after == 1.0
    # Its gain is 0.5: a threshold above that keeps it too, and says so.
    balancer, report = run(0.6)
    assert report.skipped
    assert report.reason == "no layer gains min_gain=0.6"
    assert balancer.placement.physical_to_logical.tolist() == rows.tolist()


def test_weights_have_to_fit() -> None:
    with pytest.raises(eplb.TransferError, match="weights of 1 layers were given, num_layers=3"):
        Rebalancer(ALONE, LAYERS, LOGICAL, weights=[[torch.zeros(20)]])
    with pytest.raises(eplb.PlacementError, match="not for 3 layers of 16 experts"):
        Rebalancer(ALONE, LAYERS, LOGICAL, placement=eplb.Placement.default(2, LOGICAL, 20))
    with pytest.raises(eplb.TopologyError, match="num_logical=21"):
        Rebalancer(ALONE, LAYERS, 21)
