"""Ranks with different numbers of slots: the model serves right tokens through rebalances."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import eplb_plugin as eplb
from eplb_plugin.integration.torch_moe import MoEModel
from eplb_plugin.runtime.rebalancer import Rebalancer
from tests.processes import run_ranks
from tests.runtime.cases import fill, random_placement, wrong_rows
from tests.runtime.test_torch_moe import CONFIG as TWELVE
from tests.runtime.test_torch_moe import PLANNER, batch, same

CONFIG = TWELVE.model_copy(update={"num_logical": 8})
TOPOLOGY = eplb.Topology(num_ranks=3, num_slots=10, rank_slots=(4, 3, 3))
REBALANCES, MOST = 4, 2000  # the latter steps


def serve(rank: int, mode: str, verify: str, local_first: bool) -> tuple[int, int]:
    options = eplb.RebalancerOptions(
        mode=mode,
        interval=4,
        history=1,
        dispatch="local_first" if local_first else "even",
        verify=verify,
        background_share=1,
    )
    model, reference = MoEModel(CONFIG, TOPOLOGY, options=options, planner=PLANNER), MoEModel(CONFIG)
    assert len(model.experts[0][0]) == TOPOLOGY.slots_by_rank[rank]
    reports: list[eplb.RebalanceReport] = []
    ended = torch.zeros(1)
    for step in range(MOST):
        tokens = batch(step, rank)
        assert same(model.forward(tokens), reference.forward(tokens)), f"step {step}"
        report = model.step(is_dummy=not tokens.numel())
        if report is not None:
            assert report.mismatches == 0
            assert model.wrong_slots() == 0
            reports.append(report)
        # In the background a rebalance ends at another step on each rank.
        dist.all_reduce(ended.fill_(len(reports)), dist.ReduceOp.MIN)
        if ended >= REBALANCES:
            break
    assert not model.rebalancer.off
    model.rebalancer.close()
    reports = reports[:REBALANCES]
    return len(reports), sum(report.moves for report in reports)


@pytest.mark.parametrize(
    ("mode", "verify", "local_first"),
    [("sync", "all", False), ("sync", "sampled", True), ("async", "all", False)],
)
def test_ranks_with_4_3_and_3_slots_serve_right_tokens(mode: str, verify: str, local_first: bool) -> None:
    results = run_ranks(serve, 3, mode, verify, local_first)
    assert all(result == results[0] for result in results)
    rebalances, moves = results[0]
    assert rebalances == REBALANCES
    assert moves > 0


def shrink(rank: int) -> list[str]:
    """Ranks 4, 3, 3 become 4, 2, 4 by a placement with holes: rank 1 is new, and expert bytes follow."""
    after = eplb.Topology(num_ranks=3, num_slots=10, rank_slots=(4, 2, 4))
    old = random_placement(1, 5, 10, 3)
    rows = eplb.regroup(old, TOPOLOGY, [0, None, 2], new_slots=2)
    held = torch.cat([rows, torch.full((1, 1), -1)], 1)  # rank 2 gets a slot more
    assert held[0].tolist() == [*old.physical_to_logical[0, :4].tolist(), -1, -1, *held[0, 6:9].tolist(), -1]
    mine = after.slots_of_rank(rank)
    weights = [[torch.zeros(mine.stop - mine.start, 6), torch.zeros(mine.stop - mine.start)]]
    for slot, expert in enumerate(held[0, mine].tolist()):
        if expert >= 0:
            fill([tensor[slot : slot + 1] for tensor in weights[0]], 0, [expert])

    def restore(layer: int, expert: int, slot: int) -> None:
        fill([tensor[slot : slot + 1] for tensor in weights[layer]], layer, [expert])

    options = eplb.RebalancerOptions(mode="sync", interval=2)
    balancer = Rebalancer(
        after, 1, 5, weights=weights, placement=held, restore=restore, options=options, planner=PLANNER
    )
    wrong = wrong_rows(weights, balancer.placement, mine)
    balancer.close()
    return wrong


def test_a_group_starts_with_empty_slots_on_uneven_ranks() -> None:
    assert run_ranks(shrink, 3) == [[], [], []]


def test_what_uneven_ranks_cannot_do_is_refused() -> None:
    placement = eplb.Placement.default(1, 8, 10)
    with pytest.raises(eplb.TopologyError, match="equally many slots on every rank"):
        eplb.regroup(placement, TOPOLOGY, [0, None])
    assert eplb.regroup(placement, TOPOLOGY, [2, 0]).tolist() == [[7, 0, 1, 0, 1, 2, 3]]


def without_slots(rank: int) -> str:
    topology = eplb.Topology(num_ranks=2, num_slots=4, rank_slots=(4, 0))
    with pytest.raises(eplb.TopologyError, match="ranks without slots; leave them out") as caught:
        Rebalancer(topology, 1, 4)
    return str(caught.value)


def test_a_rank_without_slots_is_refused_on_all() -> None:
    assert len(set(run_ranks(without_slots, 2))) == 1
