"""Replaying loads offline: what is planned from what, scored on what, and counted how."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import ANY

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_plugin.config.options import EnsembleOptions, PlannerOptions
from eplb_plugin.core.balancedness import balancedness, count_moves
from eplb_plugin.core.errors import ConfigError, LoadError, PlacementError, TopologyError, TraceError
from eplb_plugin.core.load import fold_steps
from eplb_plugin.core.placement import Placement
from eplb_plugin.core.topology import Topology
from eplb_plugin.dispatch.balance_batch import balance_batch
from eplb_plugin.dispatch.rank_costs import rank_costs
from eplb_plugin.formats.loads import read_trace
from eplb_plugin.offline.dispatch_replay import SPLITS
from eplb_plugin.offline.simulation import POLICIES, PolicySetup, policy_setup, simulate
from eplb_plugin.offline.synthetic_traffic import generate
from eplb_plugin.offline.token_replay import fold_decode
from eplb_plugin.offline.traces import LoadTrace
from eplb_plugin.planning.planner import plan
from eplb_plugin.runtime.load_window import LoadWindow

REAL = Path(__file__).resolve().parents[2] / "shared" / "traces"
TOPOLOGY = Topology(num_ranks=4, num_slots=40)


@pytest.fixture(scope="module")
def trace():
    return generate("gpt-oss-20b", layers=3, steps=70, tokens_per_step=256, period=64)


class Recorder:
    """A policy that keeps what it is called with, and turns the placement by one slot."""

    def __init__(self):
        self.windows = []
        self.currents = []

    def __call__(self, window, topology, current):
        self.windows.append(window)
        self.currents.append(current)
        return Placement(current.physical_to_logical.roll(1, 1), current.num_logical)


def test_a_policy_sees_the_past_alone(trace):
    policy = Recorder()
    result = simulate(trace, TOPOLOGY, PolicySetup("mine", policy), 20, snapshots=5, history=2)
    assert result.policy == "mine"
    assert [part.first_step for part in result.intervals] == [20, 40, 60]
    assert [part.steps for part in result.intervals] == [20, 20, 10]
    assert [window.shape[0] for window in policy.windows] == [5, 10, 10]
    load = trace.load.double()
    for window, start in zip(policy.windows, (0, 0, 20), strict=True):
        steps = load[start : start + 4 * window.shape[0]]
        assert torch.equal(window, steps.view(-1, 4, *load.shape[1:]).sum(1))
    assert policy.currents[0] == Placement.default(3, 32, 40)
    turned = [current.physical_to_logical[0, 0].item() for current in policy.currents]
    assert turned == [0, 7, 6]


def test_each_placement_is_scored_on_the_steps_after_it(trace):
    policy = Recorder()
    result = simulate(trace, TOPOLOGY, PolicySetup("mine", policy), 20)
    placements = [*policy.currents[1:], None]
    placements[-1] = Placement(policy.currents[-1].physical_to_logical.roll(1, 1), 32)
    steps = []
    for part, before, after in zip(result.intervals, policy.currents, placements, strict=True):
        ahead = trace.load[part.first_step : part.first_step + part.steps]
        steps += [balancedness(step, after, TOPOLOGY) for step in ahead]
        assert part.balancedness == pytest.approx(balancedness(ahead, after, TOPOLOGY))
        assert part.moves == int(count_moves(before, after, TOPOLOGY).sum())
        assert part.plan_ms >= 0
    assert result.balancedness == pytest.approx(sum(steps) / len(steps))
    moves = sum(part.moves for part in result.intervals)
    assert result.moved_share == pytest.approx(moves / (3 * 3 * 40))


def test_static_moves_nothing(trace):
    result = simulate(trace, TOPOLOGY, "static", 20)
    default = Placement.default(3, 32, 40)
    assert result.balancedness == pytest.approx(balancedness(trace.load[20:], default, TOPOLOGY))
    assert result.moved_share == 0


def test_greedy_plans_from_the_last_interval_and_forgets(trace):
    result = simulate(trace, TOPOLOGY, "greedy", 20, snapshots=7, history=3)
    options = PlannerOptions(policy="greedy")
    for part in result.intervals:
        past = trace.load[part.first_step - 20 : part.first_step].sum(0)
        expected = plan(past, TOPOLOGY, options=options)
        assert part.predicted == pytest.approx(expected.balancedness)
        ahead = trace.load[part.first_step : part.first_step + part.steps]
        assert part.balancedness == pytest.approx(balancedness(ahead, expected.placement, TOPOLOGY))


def test_adaptive_starts_from_the_placement_in_force(trace):
    result = simulate(trace, TOPOLOGY, "adaptive", 20, snapshots=4, history=2)
    current, past = Placement.default(3, 32, 40), []
    for part in result.intervals:
        past.append(fold_steps(trace.load[part.first_step - 20 : part.first_step], 4))
        expected = plan(torch.cat(past[-2:]), TOPOLOGY, current)
        assert part.predicted == pytest.approx(expected.balancedness)
        assert part.moves == expected.moves
        current = expected.placement


def test_balancing_pays_on_skewed_traffic(trace):
    results = {name: simulate(trace, TOPOLOGY, name, 20) for name in POLICIES}
    assert results["greedy"].balancedness > results["static"].balancedness + 0.1
    assert results["ensemble"].balancedness > results["static"].balancedness + 0.1
    assert results["adaptive"].balancedness > results["static"].balancedness + 0.1
    assert results["adaptive"].moved_share < results["greedy"].moved_share


def test_the_planner_gets_its_options(trace):
    window, current = trace.load[:20].double(), Placement.default(3, 32, 40)
    options = PlannerOptions(max_moves=3)
    setup = policy_setup("adaptive", options)
    assert setup.policy(window, TOPOLOGY, current) == plan(window, TOPOLOGY, current, options).placement
    packer = EnsembleOptions(seed=5, num_candidates=3)
    # Planning from scratch, it cannot keep the bound of moves of the others.
    setup = policy_setup("ensemble", PlannerOptions(max_moves=3, ensemble=packer))
    options = PlannerOptions(policy="ensemble", ensemble=packer)
    assert setup.policy(window, TOPOLOGY, current) == plan(window, TOPOLOGY, current, options).placement


def test_dispatches_are_judged_on_single_steps(trace):
    """Step by step, from the tokens of each slot."""
    policy = Recorder()
    result = simulate(
        trace,
        TOPOLOGY,
        PolicySetup("mine", policy),
        20,
        dispatches=("balanced", "even", "sampled", "even"),
        expert_cost=12,
        seed=5,
    )
    assert [item.dispatch for item in result.dispatches] == ["balanced", "even", "sampled"]
    last = Placement(policy.currents[-1].physical_to_logical.roll(1, 1), 32)
    placements = [*policy.currents[1:], last]
    costs, found = {}, {}
    for name, split in SPLITS.items():
        costs[name], found[name] = 0, []
        for part, placement in zip(result.intervals, placements, strict=True):
            ahead = trace.load[part.first_step : part.first_step + part.steps].to(torch.int64)
            tokens = split(ahead, placement, TOPOLOGY, 12, (5, part.first_step, 0))
            for step in tokens:
                loads = step.view(3, 4, 10).sum(2)
                found[name].append(float(loads.double().mean(1).sum() / loads.amax(1).sum()))
            costs[name] += int(rank_costs(tokens, TOPOLOGY, 12).amax(2).sum())
    balanced, even, sampled = result.dispatches
    # The even split is judged in shares of tokens, as ever.
    assert even.balancedness == pytest.approx(result.balancedness)
    assert even.intervals == tuple(part.balancedness for part in result.intervals)
    load = float(trace.load[20:].double().sum()) / 4
    assert even.cost_ratio == 1
    for item in (balanced, sampled):
        name = item.dispatch
        assert item.balancedness == pytest.approx(sum(found[name]) / len(found[name]))
        assert min(item.intervals) <= item.balancedness <= max(item.intervals)
        assert item.cost == pytest.approx(costs[name] / load)
        assert item.cost_ratio == costs[name] / costs["even"]
    assert balanced.cost_ratio < 0.98


def test_balanced_dispatch_gains_and_exact_tokens_gain_more_than_drawn_ones(trace):
    names = ("even", "sampled", "balanced")
    result = simulate(trace, TOPOLOGY, "adaptive", 20, dispatches=names)
    even, sampled, balanced = (item.balancedness for item in result.dispatches)
    assert even < sampled - 0.01 < balanced - 0.02
    # Without an expert cost, tokens are the cost.
    for item in result.dispatches:
        assert item.cost == pytest.approx(1 / item.balancedness, rel=0.02)
        assert item.cost_ratio == pytest.approx(item.cost / result.dispatches[0].cost)
    again = simulate(trace, TOPOLOGY, "adaptive", 20, dispatches=names)
    assert again.dispatches == result.dispatches
    other = simulate(trace, TOPOLOGY, "adaptive", 20, dispatches=names, seed=1)
    assert other.dispatches[1] != result.dispatches[1]
    assert other.dispatches[2] == result.dispatches[2]
    assert simulate(trace, TOPOLOGY, "adaptive", 20).dispatches == ()


def test_dispatches_with_ranks_that_differ_or_hold_nothing(trace):
    """The mean load is that of the ranks that hold experts, for every dispatch."""
    topology = Topology(num_ranks=4, num_slots=40, rank_slots=(16, 14, 0, 10))
    result = simulate(trace, topology, "static", 20, dispatches=("even", "balanced"))
    even, balanced = result.dispatches
    assert even.balancedness == pytest.approx(result.balancedness)
    default = Placement.default(3, 32, 40)
    steps = []
    for step in balance_batch(trace.load[20:], default, topology):
        loads = [step[:, topology.slots_of_rank(rank)].sum(1).double() for rank in (0, 1, 3)]
        steps.append(float(torch.stack(loads).mean(0).sum() / torch.stack(loads).amax(0).sum()))
    assert balanced.balancedness == pytest.approx(sum(steps) / len(steps))
    empty = LoadTrace(torch.zeros(4, 2, 8))
    idle = simulate(
        empty, Topology(num_ranks=2, num_slots=8), "static", 2, dispatches=("balanced",), expert_cost=9
    )
    assert (idle.dispatches[0].balancedness, idle.dispatches[0].cost_ratio) == (1, 1)


def test_long_intervals_are_judged_in_parts(trace, monkeypatch):
    whole = simulate(trace, TOPOLOGY, "static", 20, dispatches=("balanced",), expert_cost=12)
    monkeypatch.setattr("eplb_plugin.offline.dispatch_replay._MOST_CELLS", 3 * 40 * 7)
    assert simulate(
        trace, TOPOLOGY, "static", 20, dispatches=("balanced",), expert_cost=12
    ) == whole.__class__(**{**vars(whole), "plan_ms": ANY, "intervals": ANY})


def test_progress_is_told(trace):
    told = []
    simulate(trace, TOPOLOGY, "static", 20, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 20))
def test_folding_is_that_of_the_load_window(interval, snapshots):
    load = torch.arange(interval * 2 * 3).view(interval, 2, 3) % 11
    window = LoadWindow(2, 3, interval=interval, snapshots=snapshots)
    for step in load:
        for layer, counts in enumerate(step):
            window.record_counts(layer, counts)
        window.step()
    assert torch.equal(fold_steps(load, snapshots), window.take().snapshots)


def test_loads_of_floats_are_folded_too():
    load = torch.rand(10, 2, 3)
    torch.testing.assert_close(fold_steps(load, 1)[0], load.double().sum(0))


def test_what_cannot_be_simulated(trace):
    with pytest.raises(TraceError, match="70 steps: with interval=70"):
        simulate(trace, TOPOLOGY, "static", 70)
    with pytest.raises(TraceError, match="interval=0"):
        simulate(trace, TOPOLOGY, "static", 0)
    with pytest.raises(TraceError, match="history=0"):
        simulate(trace, TOPOLOGY, "static", 20, history=0)
    with pytest.raises(ConfigError, match="no policy 'best'; there are static, adaptive, ensemble, greedy"):
        simulate(trace, TOPOLOGY, "best", 20)
    with pytest.raises(TopologyError, match="num_slots=28"):
        simulate(trace, Topology(num_ranks=4, num_slots=28), "static", 20)
    with pytest.raises(ConfigError, match="no dispatch 'best' to replay; there are even, balanced, sampled"):
        simulate(trace, TOPOLOGY, "static", 20, dispatches=("even", "best"))
    with pytest.raises(LoadError, match="expert_cost=-1 is below 0"):
        simulate(trace, TOPOLOGY, "static", 20, dispatches=("balanced",), expert_cost=-1)
    means = LoadTrace(trace.load.double() / 4, "means")
    assert simulate(means, TOPOLOGY, "static", 20).balancedness > 0
    with pytest.raises(TraceError, match=r"means: step 0, layer .* tokens; dispatch is judged on batches"):
        simulate(means, TOPOLOGY, "static", 20, dispatches=("balanced",))
    shrink = PolicySetup("shrink", lambda window, topology, current: Placement.default(3, 32, 36))
    with pytest.raises(PlacementError, match="policy 'shrink' returned"):
        simulate(trace, TOPOLOGY, shrink, 20)


def test_an_idle_trace_is_balanced():
    result = simulate(LoadTrace(torch.zeros(4, 2, 8)), Topology(num_ranks=2, num_slots=8), "adaptive", 2)
    assert result.balancedness == 1
    assert result.moved_share == 0


@pytest.mark.skipif(not REAL.is_dir(), reason="no recorded traces beside the repository")
def test_adaptive_is_not_below_greedy_on_real_traffic():
    folded = fold_decode(read_trace(REAL / "gpt_oss_20b_decode_tokens.npz"), 256, steps=1024)
    topology = Topology(num_ranks=8, num_slots=40)
    greedy, adaptive = (simulate(folded, topology, name, 256) for name in ("greedy", "adaptive"))
    assert adaptive.balancedness >= greedy.balancedness
    assert adaptive.moved_share < 0.3 * greedy.moved_share
