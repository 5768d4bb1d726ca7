"""The price of a move in seconds, by hand; and `move_price: auto` against the best of a sweep."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import eplb_plugin as eplb
from eplb_plugin.advisor.machine import Machine
from eplb_plugin.advisor.trial import Setting, try_setting
from eplb_plugin.config.options import AUTO_MOVE_PRICE
from eplb_plugin.offline.synthetic_traffic import generate
from eplb_plugin.planning.move_cost import (
    EXPERT_SHARE,
    MoveCost,
    default_bandwidth,
    serving_share,
    with_price,
)

TOPOLOGY = eplb.Topology(num_ranks=8, num_slots=40)
# An expert takes 10 ms of a link; the experts of a layer 5 ms of a step.
COST = MoveCost(expert_bytes=10e6, bandwidth=1e9, num_ranks=8, num_layers=10, step_seconds=0.1, interval=100)


def test_the_arithmetic_of_an_example():
    # The busiest of 8 ranks has twice the mean: 10 ms * 2 / 8.
    assert COST.move_seconds == pytest.approx(0.0025)
    # 5 ms in each of 4 * 100 steps.
    assert COST.rank_price == pytest.approx(0.0025 / (0.005 * 400))
    # Five slots a rank: 0.00625 of a slot load, and the power of two nearest to it.
    assert COST.move_price(TOPOLOGY) == 0.008
    background = replace(COST, serving_share=serving_share("async"))
    assert background.move_seconds == pytest.approx(0.00025)
    assert background.move_price(TOPOLOGY) == 0.002
    # Half of each step are experts: 50 ms over the balancedness, in 100 steps.
    assert COST.gain_seconds(0.8, 1.0) == pytest.approx(100 * 0.05 * (1 / 0.8 - 1))
    assert COST.gain_seconds(0.9, 0.9) == 0
    assert COST.gain_seconds(0.9, 0.8) < 0


def test_the_example_of_deepseek_v3():
    cost = MoveCost(
        expert_bytes=44e6, bandwidth=45e9, num_ranks=32, num_layers=58, step_seconds=0.04, interval=256
    )
    topology = eplb.Topology(num_nodes=4, num_ranks=32, num_slots=288)
    assert 1e6 * cost.move_seconds == pytest.approx(61, abs=0.5)
    assert 1e6 * EXPERT_SHARE * cost.step_seconds / 58 == pytest.approx(345, abs=0.5)
    assert cost.rank_price == pytest.approx(0.00017, abs=5e-6)
    assert cost.rank_price * 9 == pytest.approx(0.0016, abs=5e-5)
    assert cost.move_price(topology) == 0.002


def test_prices_follow_each_number_and_stay_within_their_bounds():
    prices = [replace(COST, expert_bytes=1e3 * 2**n).move_price(TOPOLOGY) for n in range(24)]
    assert prices == sorted(prices)
    assert set(prices) == {0.002 * 2**n for n in range(7)}
    # A move never is free: price 0 would plan from scratch.
    assert replace(COST, bandwidth=1e30).move_price(TOPOLOGY) == 0.002
    assert replace(COST, bandwidth=1.0).move_price(TOPOLOGY) == 0.128
    base = COST.rank_price
    for field, factor in (
        ("expert_bytes", 2),
        ("num_layers", 2),
        ("bandwidth", 1 / 2),
        ("num_ranks", 1 / 2),
        ("step_seconds", 1 / 2),
        ("interval", 1 / 2),
    ):
        other = replace(COST, **{field: getattr(COST, field) * 2})
        assert other.rank_price == pytest.approx(base * factor), field


def test_bad_numbers_are_refused():
    for field in ("expert_bytes", "bandwidth", "num_ranks", "num_layers", "step_seconds", "interval"):
        for value in (0, -1, math.inf, math.nan):
            with pytest.raises(eplb.ConfigError, match=rf"{field}={value} is not above 0"):
                replace(COST, **{field: value})


def test_bandwidth_without_a_measurement():
    assert default_bandwidth(TOPOLOGY, None) == 400e9
    assert default_bandwidth(eplb.Topology(num_nodes=2, num_ranks=8, num_slots=40), None) == 45e9
    assert default_bandwidth(TOPOLOGY, 12.5) == 12.5e9


def test_a_number_stays_and_auto_gets_one():
    options = eplb.PlannerOptions(max_moves=3)
    assert with_price(options, None, TOPOLOGY) is options
    assert with_price(options, COST, TOPOLOGY) == eplb.PlannerOptions(max_moves=3, move_price=0.008)
    by_hand = eplb.PlannerOptions(move_price=0.5)
    assert with_price(by_hand, COST, TOPOLOGY) is by_hand


@pytest.mark.parametrize("dispatch", ["even", "balanced"])
def test_a_plan_alone_takes_the_price_for_unknown_costs(dispatch):
    load = torch.empty(8, 3, 32).log_normal_(0, 1, generator=torch.Generator().manual_seed(0)) * 1000
    current = eplb.Placement.default(3, 32, 40)

    def plan(**options) -> eplb.Plan:
        return eplb.plan(load.long(), TOPOLOGY, current, eplb.PlannerOptions(dispatch=dispatch, **options))

    auto = plan()
    assert auto.placement == plan(move_price="auto").placement
    assert auto.placement == plan(move_price=AUTO_MOVE_PRICE).placement
    assert auto.placement != plan(move_price=0.5).placement


@pytest.mark.parametrize("bandwidth", [1e9, 400e9])
def test_auto_is_near_the_best_fixed_price(bandwidth):
    """Acceptance, small: bench_move_price.py has the whole of it. One draw has 1 % of chance in it."""
    trace = generate("gpt-oss-20b", layers=12, steps=1024, period=512)
    machine = Machine(
        ranks=8,
        nodes=1,
        groups=1,
        bytes_per_expert=13e6,
        bandwidth=bandwidth,
        node_bandwidth=bandwidth,
        step_seconds=0.01,
    )
    auto = machine.move_cost(12, 64).move_price(TOPOLOGY)

    def seconds(price: float) -> float:
        setting = Setting(slots=40, interval=64, move_price=price)
        trial = try_setting(trace, TOPOLOGY, setting, eplb.PlannerOptions(), eplb.RebalancerOptions())
        moves = machine.cost(trial, setting, 32, 12).transfer_seconds
        return 64 * EXPERT_SHARE * machine.step_seconds / trial.balancedness + moves

    fixed = {price: seconds(price) for price in (0.001, 0.004, 0.016, 0.064, 0.128)}
    assert seconds(auto) <= 1.02 * min(fixed.values())
    # The sweep tells prices apart: the wrong end of it is worse by more than auto may be.
    assert max(fixed.values()) > 1.05 * min(fixed.values())
