"""What moves cost."""

from __future__ import annotations

import pytest
import torch

import eplb_plugin as eplb
from eplb_plugin.offline.simulation import simulate
from eplb_plugin.offline.synthetic_traffic import generate


def changing_load(seed: int = 0) -> torch.Tensor:
    return torch.empty(8, 3, 64).log_normal_(0, 1.2, generator=torch.Generator().manual_seed(seed))


TOPOLOGY = eplb.Topology(num_ranks=8, num_slots=72)


def test_the_dearer_moves_are_the_fewer_there_are():
    trace = generate("glm-5.2", layers=3, experts=64, steps=512, drift=1.5, period=256)
    results = [
        simulate(trace, TOPOLOGY, "adaptive", 64, planner=eplb.PlannerOptions(move_price=price))
        for price in (0.001, 0.007, 0.03, 0.2, 5.0)
    ]
    shares = [result.moved_share for result in results]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == 0 < shares[-2]
    assert results[0].balancedness > results[-2].balancedness > results[-1].balancedness


def test_what_is_done_earns_its_price():
    """Summed peaks fall by more than the moves cost, up to the difference between peak and smooth peak."""
    load, current = changing_load(), eplb.Placement.default(3, 64, 72)
    for price in (0.001, 0.01, 0.1):
        # The snapshots as they are, so that what is measured is what was planned for.
        options = eplb.PlannerOptions(move_price=price, snapshot_decay=1, persistence=0, min_gain=0)
        planned = eplb.plan(load, TOPOLOGY, current, options)
        before, after = (
            eplb.rank_loads(load, x, TOPOLOGY).amax(2).sum(0) for x in (current, planned.placement)
        )
        moves = eplb.count_moves(current, planned.placement, TOPOLOGY)
        slot_load = load.double().sum((0, 2)) / TOPOLOGY.num_slots
        assert (before - after >= 0.9 * price * moves * slot_load).all()


def test_a_plan_that_is_followed_is_left_alone():
    load, current = changing_load(), eplb.Placement.default(3, 64, 72)
    moves = []
    for _ in range(4):
        plan = eplb.plan(load, TOPOLOGY, current)
        current = plan.placement
        moves.append(plan.moves)
    assert moves[0] > 3 * sum(moves[1:])
    assert moves[-1] == 0


@pytest.mark.parametrize("bound", [0, 1, 2, None])
def test_replicas_that_share_a_rank_are_parted_within_the_bound_of_moves(bound):
    topology, load = eplb.Topology(num_ranks=4, num_slots=16), torch.full((2, 12), 10.0)
    apart = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0, 1, 2, 3]
    current = torch.tensor([[0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 1, 2, 3], apart])
    # An exchange is two moves, and nothing else is worth any.
    planned = eplb.plan(load, topology, current, eplb.PlannerOptions(max_moves=bound, move_price=100))
    assert planned.moves == (2 if bound in (2, None) else 0)
    assert planned.shared_replicas == (0 if bound in (2, None) else 1)


def test_a_bound_of_moves_holds_beyond_what_has_to_be_completed():
    topology, load = eplb.Topology(num_ranks=4, num_slots=16), torch.full((1, 12), 10.0)
    current = torch.tensor([[0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 1, 2, -1]])
    planned = eplb.plan(load, topology, current, eplb.PlannerOptions(max_moves=0))
    assert planned.moves == 1
    assert planned.shared_replicas == 1
