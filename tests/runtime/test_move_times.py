"""Durations of steps and transfers, and the cost of a move that ranks agree on."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

import eplb_plugin as eplb
from eplb_plugin.planning.move_cost import MoveCost
from eplb_plugin.runtime import rebalance as phases
from eplb_plugin.runtime.move_times import StepTimes, TransferTimes, move_cost_of, times_to_sum
from eplb_plugin.runtime.weights.expert_weights import ExpertWeights
from tests.processes import run_ranks
from tests.runtime.test_rebalancer import ALONE, LAYERS, LOGICAL, PAIR, counts, make_weights


def test_the_step_is_the_median_without_interruptions(monkeypatch):
    times = StepTimes()
    assert times.take() == 0
    clock = itertools.chain([0.0, 1.0, 2.5, 100.0, 101.0], [200.0, 202.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    for _ in range(5):
        times.stepped()
    assert times.take() == pytest.approx((1.0 + 1.5) / 2)  # of 1, 1.5, 97.5 and 1
    times.interrupted()
    times.stepped()
    assert times.take() == 0
    times.stepped()
    assert times.take() == 2.0


def test_the_bandwidth_is_the_median_by_bytes():
    times = TransferTimes()
    assert times.bandwidth == 0
    times.add([(0, 5.0)])
    assert times.bandwidth == 0
    # 100 bytes waited for a peer; 300 at 1000/s are more than half.
    times.add([(100, 10.0), (300, 0.3), (50, 0.001)])
    assert times.bandwidth == pytest.approx(1000)
    times.add([(1000, 0.5)])
    assert times.bandwidth == pytest.approx(2000)


def test_the_cost_is_the_mean_of_the_ranks_or_of_the_options():
    options = eplb.RebalancerOptions(interval=10, step_ms=20, bandwidth=3, mode="sync")
    weights = ExpertWeights(make_weights(PAIR, 0), PAIR, 0)
    assert sum(weights.expert_bytes) == LAYERS * (60 + 12 + 1)
    unknown = times_to_sum(0.0, TransferTimes())
    assert unknown.tolist() == [0, 0, 0, 0]
    expected = MoveCost(
        expert_bytes=73, bandwidth=3e9, num_ranks=2, num_layers=LAYERS, step_seconds=0.02, interval=10
    )
    assert move_cost_of(unknown, weights, PAIR, options) == expected
    transfers = TransferTimes()
    transfers.add([(10**6, 0.5)])
    mine = times_to_sum(0.004, transfers)
    assert mine.tolist() == [4_000_000, 2_000, 1, 1]
    # The other rank steps in 6 ms and has transferred nothing.
    found = move_cost_of(mine + times_to_sum(0.006, TransferTimes()), weights, PAIR, options)
    assert found is not None
    assert (found.step_seconds, found.bandwidth) == (pytest.approx(0.005), pytest.approx(2e6))
    assert move_cost_of(mine, ExpertWeights([[]] * LAYERS, PAIR, 0), PAIR, options) is None
    assert move_cost_of(mine, weights, ALONE, options) is None


def _priced_rebalances(rank: int, mode: str) -> list[tuple[object, ...]]:
    """Ranks that step at different speeds: the prices that they plan with, the placement, and reports."""
    options = eplb.RebalancerOptions(interval=4, mode=mode, planning="sharded", background_share=1)
    prices: list[object] = []
    plan = phases.plan

    def noting(load, topology, current, options, **more):
        prices.append(options.move_price)
        return plan(load, topology, current, options, **more)

    phases.plan = noting
    balancer = eplb.Rebalancer(
        PAIR,
        LAYERS,
        LOGICAL,
        weights=make_weights(PAIR, rank),
        options=options,
        planner=eplb.PlannerOptions(min_gain=0),
    )
    try:
        for step in range(12):
            for layer in range(LAYERS):
                balancer.record_counts(layer, counts(step, rank, layer))
            time.sleep(0.01 * (rank + 1))
            balancer.step()
    finally:
        balancer.close()
        phases.plan = plan
    told = [(r.step, r.moves, r.move_cost_seconds, r.gain_seconds) for r in balancer.reports]
    return [tuple(sorted(set(map(str, prices)))), balancer.placement.physical_to_logical.tolist(), *told]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_ranks_agree_on_the_price_and_the_report_says_what_moves_cost(mode):
    first, second = run_ranks(_priced_rebalances, 2, mode)
    assert first[1:] == second[1:]
    prices, _, *reports = first
    # Each rank plans its share of the layers at the same prices, and never at the one for unknown costs.
    assert prices == second[0]
    assert prices
    assert set(prices) <= {str(0.002 * 2**n) for n in range(7)}
    assert reports[0][1] > 0
    if mode == "sync":
        # The first price is for the bandwidth of the options, 400 GB/s; no message of some bytes has that.
        assert len(reports) == 3
        per_move = [cost / moves for _, moves, cost, _ in reports if moves]
        assert len(per_move) > 1
        assert min(per_move[1:]) > 10 * per_move[0]
    for _, moves, cost, gain in reports:
        assert (cost > 0) == (moves > 0)
        assert moves or gain == 0
    # Steps of 10 and 20 ms are 15 ms, so experts take 30 ms of four balanced steps: no gain is much above.
    assert 0 < reports[0][3] < 1


def test_a_loop_without_weights_knows_no_costs():
    balancer = eplb.Rebalancer(
        ALONE, LAYERS, LOGICAL, options=eplb.RebalancerOptions(interval=1, mode="sync")
    )
    balancer.record_counts(0, torch.ones(LOGICAL, dtype=torch.int64))
    report = balancer.step()
    assert report is not None
    assert (report.move_cost_seconds, report.gain_seconds) == (None, None)
