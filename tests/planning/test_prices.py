"""What moves cost: more for each that follows, none for those that completing a placement took."""

from __future__ import annotations

import pytest
import torch

import eplb_plugin as eplb
from eplb_plugin.planning.kernels.layer import _moves_to
from eplb_plugin.planning.kernels.prices import _price_of_all, _price_of_next


@pytest.mark.parametrize("slots", [32, 288])
def test_all_moves_cost_what_they_cost_one_by_one(slots):
    for moves in (0, 1, slots // 16, slots // 4, slots):
        thousandth = moves / 1000
        one_by_one = sum(_price_of_next(0.5, (at + 0.5) * thousandth, slots) for at in range(1000))
        assert _price_of_all(0.5, moves, slots) == pytest.approx(one_by_one * thousandth, rel=1e-4)
    assert _price_of_next(0.5, slots / 16, slots) == 1.0
    assert _price_of_next(0.5, slots / 8, slots) == 2.5
    assert _price_of_next(0.5, -3, slots) == 0.5


def test_moves_to_a_placement_are_those_that_the_metric_counts():
    generator = torch.Generator().manual_seed(3)
    topology = eplb.Topology(num_ranks=4, num_slots=20)
    before, after = (
        torch.stack([torch.randperm(12, generator=generator).repeat(2)[:20] for _ in range(6)])
        for _ in range(2)
    )
    counted = eplb.count_moves(eplb.Placement(before, 12), eplb.Placement(after, 12), topology)
    found = [_moves_to(new.numpy(), old.numpy(), 5) for new, old in zip(after, before, strict=True)]
    assert found == counted.tolist()


def test_traffic_that_turns_over_is_followed_in_several_steps(backend):
    """From one placement to a far better one: a rebalance goes part of the way, the next ones the rest."""
    if backend == "tensors":
        pytest.skip("plans from scratch")
    generator = torch.Generator().manual_seed(0)
    load = torch.empty(8, 3, 64).log_normal_(0, 1.2, generator=generator)
    topology = eplb.Topology(num_ranks=8, num_slots=72)
    current = eplb.Placement.default(3, 64, 72)
    balance, moves = [eplb.balancedness(load, current, topology)], []
    for _ in range(4):
        plan = eplb.plan(load, topology, current)
        current = plan.placement
        balance.append(plan.balancedness)
        moves.append(plan.moves)
    assert balance == sorted(balance)
    assert moves[0] > max(moves[1:])
    assert sum(moves[1:]) > 0
