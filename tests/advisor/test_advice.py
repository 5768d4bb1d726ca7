"""What `advise` predicts is what a replay measures, and it says so when that cannot be trusted."""

from __future__ import annotations

import pytest
import torch

from eplb_plugin.advisor import advice as advice_module
from eplb_plugin.advisor.advice import advise, similarity
from eplb_plugin.advisor.trial import Trial
from eplb_plugin.advisor.verdict import is_worth_it, verdict
from eplb_plugin.config.options import PlannerOptions
from eplb_plugin.core.balancedness import balancedness
from eplb_plugin.core.errors import TopologyError, TraceError
from eplb_plugin.core.placement import Placement
from eplb_plugin.core.topology import Topology
from eplb_plugin.offline.simulation import policy_setup, simulate
from eplb_plugin.offline.traces import LoadTrace

from .cases import PLANNER, REBALANCER, advice_of, machine_of, rated


def test_similarity_of_loads():
    one = torch.rand(5, 3, 64, generator=torch.Generator().manual_seed(0))
    assert similarity(one, one * 7) == pytest.approx(1)
    assert similarity(one[:2], one[2:]) < 0.5
    other = one.flip(2).sum(0, keepdim=True)
    rows = [torch.corrcoef(torch.stack([one.sum(0)[i], other[0, i]]))[0, 1] for i in range(3)]
    assert similarity(one, other) == pytest.approx(float(torch.stack(rows).median()), abs=1e-6)
    # Layers without load, or with even load, tell nothing.
    one[:, 1] = 0
    assert similarity(one, one) == pytest.approx(1)
    assert similarity(torch.ones(2, 3, 4), torch.ones(2, 3, 4)) == 1


def halves(trace):
    middle = trace.num_steps // 2
    return LoadTrace(trace.load[:middle]), LoadTrace(trace.load[middle:])


def test_predictions_are_what_simulate_measures(steady):
    advice = advise(steady, machine_of(), PLANNER, REBALANCER)
    first, second = halves(steady)
    best = advice.best.setting
    topology = Topology(num_nodes=2, num_ranks=4, num_slots=best.slots)
    setup = policy_setup("adaptive", PlannerOptions(move_price=best.move_price))
    assert (
        advice.back_test.predicted == simulate(first, topology, setup, best.interval, history=2).balancedness
    )
    assert (
        advice.back_test.measured == simulate(second, topology, setup, best.interval, history=2).balancedness
    )
    # Nothing but noise changes: within two points, and it says so.
    assert abs(advice.back_test.predicted - advice.back_test.measured) < 0.02
    assert advice.back_test.similarity > 0.95
    assert advice.back_test.safe
    default, plain = Placement.default(2, 32, 32), Topology(num_nodes=2, num_ranks=4, num_slots=32)
    assert advice.static == balancedness(first.load, default, plain)
    assert advice.best.speedup == advice.best.trial.balancedness / advice.static
    assert is_worth_it(advice)
    assert verdict(advice, 32)[0].startswith("Worth it: with ")


def test_changed_traffic_is_noticed(changing):
    advice = advise(changing, machine_of(), PLANNER, REBALANCER, redundant=[4], intervals=[4], prices=[0.012])
    assert advice.back_test.similarity < 0.5
    assert not advice.back_test.safe
    assert "the mix of traffic changes" in verdict(advice, 32)[-1]


def test_what_is_tried(steady, monkeypatch):
    tried = []

    def watch(load, topology, setting, planner, rebalancer):
        tried.append((load.num_steps, topology.num_slots, setting))
        gain = 0.01 * setting.slots / 32 - setting.interval * 1e-4 + (setting.move_price == 0.5) * 0.1
        return Trial(
            balancedness=0.8 + gain,
            rebalances=1,
            first_moves=1,
            moves=1.0,
            busiest_within=0.0,
            busiest_between=0.0,
        )

    monkeypatch.setattr(advice_module, "try_setting", watch)
    done = []
    advice = advise(
        steady, machine_of(), PlannerOptions(move_price=0.1), REBALANCER, progress=lambda *x: done.append(x)
    )
    settings = [setting for _, _, setting in tried]
    assert {setting.slots for setting in settings} == {32, 36, 40, 48}
    assert {setting.interval for setting in settings[:12]} == {2, 4, 8}
    assert {setting.move_price for setting in settings[:12]} == {0.1}
    assert [setting.move_price for setting in settings[12:14]] == [0.025, 0.4]
    assert tried[-1] == (32, advice.best.setting.slots, advice.best.setting)
    assert len(tried) == 15
    assert done == [(index, 15) for index in range(1, 16)]

    tried.clear()
    advice = advise(
        steady, machine_of(), PLANNER, REBALANCER, redundant=[8, 0], intervals=[16], prices=[0.5, 0.5, 0.1]
    )
    assert [(setting.slots, setting.move_price) for _, _, setting in tried[:2]] == [(40, 0.5), (32, 0.5)]
    assert len(tried) == 4
    assert advice.best.setting.move_price == 0.5

    # `auto` is a number for each interval: moves pay less in a shorter one.
    tried.clear()
    machine = machine_of(bytes_per_expert=1e8)
    advise(steady, machine, PLANNER, REBALANCER, redundant=[8], intervals=[4, 16])
    topology = machine.topology(40)
    prices = {interval: machine.move_cost(2, interval).move_price(topology) for interval in (4, 16)}
    assert prices[4] == 4 * prices[16] < 0.128
    settings = [setting for _, _, setting in tried]
    assert [(setting.interval, setting.move_price) for setting in settings[:2]] == list(prices.items())
    best = prices[settings[-1].interval]
    assert [setting.move_price for setting in settings[2:4]] == [0.25 * best, 4 * best]


def test_the_bandwidth_of_a_move_is_a_mean_of_both_links():
    machine = machine_of(bandwidth=4e11, node_bandwidth=5e10, nodes=2)
    cost = machine.move_cost(3, 7)
    assert cost.bandwidth == pytest.approx(2 / (1 / 4e11 + 1 / 5e10))
    assert (cost.num_layers, cost.interval, cost.num_ranks, cost.serving_share) == (3, 7, 4, 1.0)
    assert machine_of(nodes=1).move_cost(3, 7).bandwidth == 4e11


def test_replicas_and_moves_have_to_pay():
    best = advice_module._best
    # One percent is not worth the memory, three are; then half a percent is worth the moves.
    assert best([rated(32, 1.30), rated(64, 1.31)]).setting.slots == 32
    assert best([rated(32, 1.30), rated(64, 1.34)]).setting.slots == 64
    assert best([rated(32, 1.30, 9.0), rated(32, 1.299, 2.0), rated(32, 1.2, 1.0)]).cost.bytes_per_hour == 2
    assert best([rated(32, 1.30, 9.0), rated(32, 1.29, 2.0)]).cost.bytes_per_hour == 9


@pytest.mark.parametrize(
    ("changes", "worth", "words"),
    [
        ({}, True, ["Worth it: with 4 redundant experts, a rebalance every 8 steps", "1.33 times", "held"]),
        (
            {"static": 0.96, "best": 0.97, "test_static": 0.96, "measured": 0.97},
            False,
            ["Not worth it", "even"],
        ),
        ({"best": 0.62, "measured": 0.62}, False, ["Worth little", "1.03", "too few slots"]),
        ({"share": 0.3}, False, ["Not worth it", "links are too slow", "busy 30% of the time"]),
        ({"share": 0.1}, True, ["Worth it", "1.20", "busy 10% of the time"]),
        (
            {"measured": 0.5, "alike": 0.2},
            False,
            ["Not worth it", "changes faster", "-30.0 points", "unsafe"],
        ),
        ({"alike": 0.5}, True, ["Worth it", "unsafe: the mix of traffic changes"]),
        ({"measured": 0.77}, True, ["Worth it", "-3.0 points", "missed by more than 2 points"]),
    ],
)
def test_verdicts(changes, worth, words):
    advice = advice_of(**changes)
    assert is_worth_it(advice) == worth
    said = " ".join(verdict(advice, 32))
    for word in words:
        assert word in said
    assert ("unsafe" in said) == (not advice.back_test.safe)


def test_loads_and_slots_that_do_not_do(steady):
    short = LoadTrace(steady.load[:15])
    with pytest.raises(TraceError, match="has 15 steps; advice needs 16"):
        advise(short, machine_of(), PLANNER, REBALANCER)
    with pytest.raises(TopologyError, match="num_slots=35 is not divisible"):
        advise(steady, machine_of(), PLANNER, REBALANCER, redundant=[3])
    with pytest.raises(TraceError, match="none are left to score"):
        advise(steady, machine_of(), PLANNER, REBALANCER, intervals=[32])
    for name, half in (("first", slice(0, 32)), ("second", slice(32, None))):
        idle = steady.load.clone()
        idle[half] = 0
        with pytest.raises(TraceError, match=f"its {name} half, 32 steps, has no tokens"):
            advise(LoadTrace(idle), machine_of(), PLANNER, REBALANCER)
    advise(LoadTrace(steady.load[:16]), machine_of(), PLANNER, REBALANCER, prices=[0.012])
