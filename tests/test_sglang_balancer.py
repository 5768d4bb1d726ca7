"""SGLang's algorithm without SGLang: what it makes of the counts, and that ranks cannot drift apart."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest

import eplb_plugin as eplb
from eplb_plugin.core.balancedness import balancedness
from eplb_plugin.dispatch.shares import nearest_shares
from eplb_plugin.integration.sglang import static_dispatch
from eplb_plugin.integration.sglang.policy import SglangBalancer, fold_busy_steps, sample_busy_steps
from eplb_plugin.observability.prometheus import Telemetry
from eplb_plugin.planning.fair_table import fair_table, plan_fair_table
from tests.processes import RanksFailedError, run_ranks
from tests.series import samples

TOPOLOGY = eplb.Topology(num_ranks=2, num_slots=12)
LAYERS, LOGICAL = 3, 8


def start():
    return eplb.Placement.default(LAYERS, LOGICAL, TOPOLOGY.num_slots).physical_to_logical


def interval(seed, steps=20, dense=True):
    """int32 [steps, layers, logical]; layer 0 is dense."""
    generator = torch.Generator().manual_seed(seed)
    heat = 100 * torch.rand(1, LAYERS, LOGICAL, generator=generator) ** 4
    counts = torch.poisson(heat.expand(steps, -1, -1), generator=generator).int()
    counts[:, 0] *= not dense
    return counts


def test_folding_leaves_out_steps_that_were_never_recorded():
    counts = interval(0, steps=9)
    gaps = torch.zeros(20, LAYERS, LOGICAL, dtype=torch.int32)
    gaps[5:11], gaps[13:16] = counts[:6], counts[6:]
    assert torch.equal(fold_busy_steps(gaps, 4), fold_busy_steps(counts, 4))
    assert torch.equal(fold_busy_steps(gaps, 16), counts.long())
    assert torch.equal(sample_busy_steps(gaps, 4), counts[[0, 2, 4, 6]].long())
    assert torch.equal(sample_busy_steps(gaps, 16), counts.long())
    assert sample_busy_steps(gaps[:5], 4).shape == (0, LAYERS, LOGICAL)
    assert fold_busy_steps(gaps, 1).tolist() == [counts.sum(0).tolist()]
    assert fold_busy_steps(gaps[:5], 4).shape == (0, LAYERS, LOGICAL)
    assert fold_busy_steps(counts, 4).sum(0).tolist() == counts.sum(0).tolist()


def test_folding_does_not_overflow():
    counts = torch.full((4, 1, 2), 2**31 - 1, dtype=torch.int32)
    assert fold_busy_steps(counts, 2).tolist() == [[[2**32 - 2] * 2]] * 2


@pytest.mark.parametrize("counts", [torch.ones(2, 3, dtype=torch.int32), torch.ones(2, 3, 4)])
def test_folding_refuses_what_is_not_counts(counts):
    with pytest.raises(eplb.LoadError, match="not integers"):
        fold_busy_steps(counts, 4)


def test_what_comes_before_the_first_rebalance_comes_once():
    balancer, calls = SglangBalancer("eplb_plugin"), []
    balancer.before_first = lambda: calls.append(len(balancer.planner.reports))
    for seed in range(2):
        balancer.rebalance(interval(seed), TOPOLOGY, start())
    assert calls == [0]


def test_maps_are_what_sglang_expects():
    balancer = SglangBalancer("eplb_plugin")
    maps = balancer.rebalance(interval(1), TOPOLOGY, start())
    placement = eplb.Placement(maps.physical_to_logical, LOGICAL)
    placement.validate(TOPOLOGY)
    assert torch.equal(maps.logical_to_physical, placement.logical_to_physical)
    assert torch.equal(maps.replica_count, placement.replica_count)
    assert torch.equal(maps.physical_to_logical[0], start()[0])  # the dense layer
    assert not torch.equal(maps.physical_to_logical, start())
    expected = eplb.plan(fold_busy_steps(interval(1), 32), TOPOLOGY, start()).placement
    assert torch.equal(maps.physical_to_logical, expected.physical_to_logical)


def test_columns_of_fused_shared_experts_are_left_out_and_told_once(caplog):
    """DeepSeek-V3 with its shared expert fused: 257 columns for 256 experts. Here 9 for 8."""
    fused, plain = SglangBalancer("eplb_plugin"), SglangBalancer("eplb_plugin")
    registry = CollectorRegistry()
    fused.planner.telemetry = Telemetry(registry).of("moe")
    for seed in range(2):
        counts = interval(seed)
        # Every token goes to the shared expert.
        shared = torch.cat([counts, counts.sum(2, keepdim=True)], dim=2)
        with caplog.at_level(logging.WARNING):
            maps = fused.rebalance(shared, TOPOLOGY, start())
        expected = plain.rebalance(counts, TOPOLOGY, start())
        assert all(torch.equal(*pair) for pair in zip(maps, expected, strict=True))
        assert maps.replica_count.shape == (LAYERS, LOGICAL)
        assert not torch.equal(maps.physical_to_logical, start())
    (line,) = caplog.messages
    assert "SGLang's counts have 9 columns for 8 routed experts: the last 1 are taken for" in line
    assert fused.planner.warnings == {"shared_expert": 2}
    assert not plain.planner.warnings
    assert samples(generate_latest(registry))["eplb_warnings_total{shared_expert,moe}"] == 2


def test_too_few_columns_keep_the_map(caplog):
    balancer = SglangBalancer("eplb_plugin")
    maps = balancer.rebalance(interval(1)[..., :7], TOPOLOGY, start())
    assert torch.equal(maps.physical_to_logical, start())
    assert balancer.planner.failures == 1
    assert "LoadError: counts have 7 columns, the map 8 experts" in caplog.text
    with pytest.raises(eplb.LoadError, match="counts have 7 columns, the map 8 experts"):
        balancer.place_at_start(interval(1)[..., :7], TOPOLOGY, LOGICAL)


def test_an_idle_server_keeps_its_map():
    balancer = SglangBalancer("eplb_plugin")
    idle = torch.zeros(20, LAYERS, LOGICAL, dtype=torch.int32)
    assert torch.equal(balancer.rebalance(idle, TOPOLOGY, start()).physical_to_logical, start())
    assert balancer.planner.failures == 0


def test_the_history_is_dropped_when_the_group_changes():
    fresh, grown = SglangBalancer("eplb_plugin"), SglangBalancer("eplb_plugin")
    grown.rebalance(interval(1), TOPOLOGY, start())
    wider = eplb.Topology(num_ranks=3, num_slots=12)
    assert torch.equal(
        grown.rebalance(interval(2), wider, start()).physical_to_logical,
        fresh.rebalance(interval(2), wider, start()).physical_to_logical,
    )
    # Without a change, it counts.
    fresh, kept = SglangBalancer("eplb_plugin"), SglangBalancer("eplb_plugin")
    kept.rebalance(interval(1), TOPOLOGY, start())
    assert not torch.equal(
        kept.rebalance(interval(2), TOPOLOGY, start()).physical_to_logical,
        fresh.rebalance(interval(2), TOPOLOGY, start()).physical_to_logical,
    )


def test_a_failure_keeps_the_map_is_told_once_and_counted(caplog):
    balancer = SglangBalancer("eplb_plugin")
    negative = interval(1)
    negative[3, 1, 2] = -5000
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert torch.equal(balancer.rebalance(negative, TOPOLOGY, start()).physical_to_logical, start())
    assert balancer.planner.failures == 3
    assert len(caplog.records) == 1
    assert "LoadError" in caplog.messages[0]
    # The next good interval is planned from as if nothing had been.
    fresh = SglangBalancer("eplb_plugin").rebalance(interval(2), TOPOLOGY, start())
    assert torch.equal(
        balancer.rebalance(interval(2), TOPOLOGY, start()).physical_to_logical, fresh.physical_to_logical
    )


PLAN_ALONE = """
import json, sys, torch
from tests.test_sglang_balancer import LAYERS, LOGICAL, SglangBalancer, TOPOLOGY, interval, start
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(int(sys.argv[1]))
balancer, current, maps = SglangBalancer("eplb_plugin"), start(), []
for seed in range(5):
    torch.rand(int(sys.argv[1]))
    current = balancer.rebalance(interval(seed), TOPOLOGY, current).physical_to_logical
    maps.append(current.tolist())
print(json.dumps(maps))
"""


@pytest.mark.timeout(600)
def test_the_plan_depends_on_nothing_but_what_was_handed_over():
    """Two processes that differ in hash seed, random state and threads plan five intervals alike."""
    outputs = []
    for number in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": number}
        command = [sys.executable, "-c", PLAN_ALONE, number]
        result = subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=240)
        outputs.append(json.loads(result.stdout.splitlines()[-1]))
    assert outputs[0] == outputs[1]
    assert len({json.dumps(maps) for maps in outputs[0]}) >= 3


def start_with_options_of_rank(rank, algorithms):
    SglangBalancer(algorithms[rank]).start(start(), LOGICAL)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("eplb_plugin", "eplb_plugin:max_moves=1"),
        ("eplb_plugin", "eplb_plugin:dispatch=balanced"),
        ("eplb_plugin:dispatch=balanced", "eplb_plugin:dispatch=balanced,expert_cost=32"),
    ],
)
def test_ranks_with_other_options_do_not_start(first, second):
    with pytest.raises(RanksFailedError, match="has other options on ranks") as caught:
        run_ranks(start_with_options_of_rank, 2, [first, second])
    assert set(caught.value.failures) == {0, 1}


def disagree(rank, algorithm):
    """Rank 1 has seen other traffic; what each rank answers, how many failures it counts, what it logs."""
    balancer = SglangBalancer(algorithm)
    maps = [balancer.rebalance(interval(1 + rank), TOPOLOGY, start()) for _ in range(2)]
    return [item.physical_to_logical.tolist() for item in maps], balancer.planner.failures


def test_ranks_that_disagree_keep_the_map_in_force():
    for maps, failures in run_ranks(disagree, 2, "eplb_plugin"):
        assert maps == [start().tolist()] * 2
        assert failures == 2


def test_without_the_check_ranks_answer_for_themselves():
    (first, none), (second, _) = run_ranks(disagree, 2, "eplb_plugin:check_agreement=false")
    assert first != second
    assert none == 0


def start_from(rank, row):
    SglangBalancer("eplb_plugin").start(torch.tensor([row]), LOGICAL)


def test_a_map_that_leaves_experts_out_does_not_start():
    with pytest.raises(RanksFailedError, match="layer 0 has no slot for expert 7 of 8"):
        run_ranks(start_from, 2, [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4])


def hot_interval() -> torch.Tensor:
    """Three passes in which expert 0 has a third of all tokens."""
    counts = interval(5)[:3].clone()
    counts[..., 0] = counts.sum(2) // 2
    return counts


@pytest.mark.parametrize("static", ["fair", "engine"])
def test_reports_have_the_shares_of_static_dispatch(static):
    balancer = SglangBalancer("eplb_plugin")
    balancer.planner.static = static
    maps = balancer.rebalance(hot_interval(), TOPOLOGY, start())
    (report,) = balancer.planner.reports
    new = eplb.Placement(maps.physical_to_logical, LOGICAL)
    window = fold_busy_steps(hot_interval(), 32)
    rows = torch.stack([balancer.planner.row(new, TOPOLOGY, rank) for rank in range(TOPOLOGY.num_ranks)])
    if static == "fair":
        served = [torch.bincount(row.flatten(), minlength=TOPOLOGY.num_slots) for row in rows.transpose(0, 1)]
        shares = torch.stack(served).double() / TOPOLOGY.num_ranks
    else:
        shares = nearest_shares(new, TOPOLOGY)
    assert report.balancedness_after == pytest.approx(balancedness(window, new, TOPOLOGY, shares))

    # The map stays, and so does its table: what was predicted is what is observed.
    balancer.planner.plan = lambda window, topology, current: current
    balancer.rebalance(hot_interval(), TOPOLOGY, new.physical_to_logical)
    assert balancer.planner.reports[1].balancedness_before == pytest.approx(report.balancedness_after)


def test_the_table_pays_the_price_of_the_plan(monkeypatch):
    planner = SglangBalancer("eplb_plugin:move_price=auto").planner
    planner.static, planner._cost = "fair", SimpleNamespace(move_price=lambda topology: 0.03)
    asked = []

    def record(load, topology, planned, in_force, options):
        asked.append(options.known_price)
        return plan_fair_table(load, topology, planned, in_force, options)

    monkeypatch.setattr(static_dispatch, "plan_fair_table", record)
    planner.plan(fold_busy_steps(hot_interval(), 32), TOPOLOGY, eplb.Placement(start(), LOGICAL))
    assert asked == [0.03]


def test_plans_that_ranks_did_not_agree_on_leave_the_table_of_the_map_in_force():
    planner = SglangBalancer("eplb_plugin").planner
    planner.static = "fair"
    window, first = fold_busy_steps(hot_interval(), 32), eplb.Placement(start(), LOGICAL)
    second = planner.plan(window, TOPOLOGY, first)
    row = planner.row(second, TOPOLOGY, 1)
    third = planner.plan(window.flip(2), TOPOLOGY, second)
    assert third != second
    assert torch.equal(planner.row(second, TOPOLOGY, 1), row)
    # Tables are for the ranks of the topology.
    planner.forget()
    alone = eplb.Topology(num_ranks=1, num_slots=TOPOLOGY.num_slots)
    ids = second.physical_to_logical
    chosen = planner.row(second, alone, 0)
    assert torch.equal(ids.gather(1, chosen), torch.arange(LOGICAL).expand(len(ids), -1))


def test_two_such_plans_leave_it_too():
    planner, topology = SglangBalancer("eplb_plugin").planner, eplb.Topology(num_ranks=4, num_slots=16)
    planner.static = "fair"
    window = fold_busy_steps(hot_interval(), 32)
    first = eplb.Placement.default(LAYERS, LOGICAL, topology.num_slots)
    second = planner.plan(window, topology, first)
    rows = [planner.row(second, topology, rank) for rank in range(4)]
    blind = fair_table(second, topology)
    assert any(not torch.equal(blind.of_rank(rank), row) for rank, row in enumerate(rows))
    for other in (window.flip(2), window.roll(1, 2)):
        assert planner.plan(other, topology, second) != second
    assert all(torch.equal(planner.row(second, topology, rank), row) for rank, row in enumerate(rows))
