"""The planner as engines hold it: a history of its own, one answer on all ranks, and never an exception."""

from __future__ import annotations

import logging

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest

import eplb_plugin as eplb
from eplb_plugin.core.load import fold_steps
from eplb_plugin.integration.common.options import EngineOptions
from eplb_plugin.integration.common.planner import EnginePlanner
from eplb_plugin.integration.common.telemetry import bytes_of_one_expert
from eplb_plugin.observability.prometheus import Telemetry, lower_bound_gap
from eplb_plugin.offline.synthetic_traffic import generate

from .series import samples

TOPOLOGY = eplb.Topology(num_ranks=4, num_slots=20)
LAYERS, LOGICAL = 3, 16


def start() -> eplb.Placement:
    return eplb.Placement.default(LAYERS, LOGICAL, TOPOLOGY.num_slots)


def traffic(steps: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    heat = torch.rand(1, LAYERS, LOGICAL, generator=generator) ** 3
    noise = torch.rand(steps, LAYERS, LOGICAL, generator=generator)
    return (1000 * heat * noise).long()


def test_it_plans_from_the_folded_intervals_that_it_has_seen():
    planner = EnginePlanner(EngineOptions(snapshots=4, history=2))
    steps = traffic(60)
    given = steps.clone()
    for part in steps.split(20):
        planner.observe(part)
    current = start()
    placement = planner.place(TOPOLOGY, current)
    assert torch.equal(steps, given)
    window = torch.cat([fold_steps(part, 4) for part in steps.split(20)[1:]])
    expected = eplb.plan(window, TOPOLOGY, start()).placement
    assert torch.equal(placement.physical_to_logical, expected.physical_to_logical)
    assert torch.equal(current.physical_to_logical, start().physical_to_logical)
    (report,) = planner.reports
    assert not report.skipped
    assert report.predicted_after > report.predicted_before
    last = fold_steps(steps[40:], 4)
    assert report.observed == pytest.approx(eplb.balancedness(last, start(), TOPOLOGY))
    assert report.moves == eplb.plan(window, TOPOLOGY, start()).moves > 0


def test_ranks_that_make_the_same_calls_get_the_same_placements():
    trace = generate("glm-5.2", layers=2, steps=120).load
    topology = eplb.Topology(num_ranks=8, num_slots=288)
    planners = [EnginePlanner() for _ in range(2)]
    placements = [eplb.Placement.default(2, 256, 288)] * 2
    for part in trace.split(40):
        for rank, planner in enumerate(planners):
            planner.observe(part.clone())
            placements[rank] = planner.place(topology, placements[rank])
        assert torch.equal(placements[0].physical_to_logical, placements[1].physical_to_logical)


def test_without_load_everything_stays():
    planner = EnginePlanner()
    planner.observe(torch.zeros(5, LAYERS, LOGICAL, dtype=torch.int32))
    assert torch.equal(planner.place(TOPOLOGY, start()).physical_to_logical, start().physical_to_logical)
    assert planner.reports[-1].reason == "no load was seen"
    assert planner.failures == 0
    # A layer without load among others, a dense one, stays too.
    load = traffic(8)
    load[:, 1] = 0
    planner.observe(load)
    placement = planner.place(TOPOLOGY, start())
    same = (placement.physical_to_logical == start().physical_to_logical).all(1)
    assert same.tolist() == [False, True, False]


def test_the_history_can_be_dropped():
    planner = EnginePlanner()
    planner.observe(traffic(8))
    planner.forget()
    planner.place(TOPOLOGY, start())
    assert planner.reports[-1].reason == "no load was seen"
    planner.observe(torch.ones(2, LAYERS + 1, LOGICAL))  # another model is welcome now
    with pytest.raises(eplb.LoadError, match=r"\(3, 16\), the history \(4, 16\)"):
        planner.observe(traffic(2))


def test_what_gains_too_little_is_skipped():
    planner = EnginePlanner(EngineOptions(planner=eplb.PlannerOptions(min_gain=0.99)))
    planner.observe(traffic(8))
    assert torch.equal(planner.place(TOPOLOGY, start()).physical_to_logical, start().physical_to_logical)
    assert planner.reports[-1].reason == "no layer gains min_gain=0.99"


class Raising(EnginePlanner):
    def plan(self, window, topology, current):
        raise ValueError("no plan today")


class Losing(EnginePlanner):
    def plan(self, window, topology, current):
        # Whoever bypasses the checks of the constructor is still found out.
        placement = super().plan(window, topology, current)
        ids = placement.physical_to_logical
        ids[ids == 3] = 4
        return placement


class Short(EnginePlanner):
    def plan(self, window, topology, current):
        return eplb.Placement.default(LAYERS - 1, LOGICAL, TOPOLOGY.num_slots)


@pytest.mark.parametrize(
    ("kind", "cause"), [(Raising, "no plan today"), (Losing, "expert 3"), (Short, "planned in place of")]
)
def test_a_planner_that_fails_keeps_the_placement_in_force(kind, cause, caplog):
    planner = kind()
    planner.observe(traffic(8))
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            placement = planner.place(TOPOLOGY, start())
            assert torch.equal(placement.physical_to_logical, start().physical_to_logical)
    assert planner.failures == 3
    assert cause in planner.reports[-1].reason
    assert len(caplog.records) == 1
    assert cause in caplog.records[0].getMessage()


def test_bad_options_and_loads_are_refused():
    with pytest.raises(eplb.ConfigError, match="histroy"):
        EngineOptions(histroy=3)
    with pytest.raises(eplb.LoadError, match=r"-1\.0"):
        EnginePlanner().observe(torch.full((1, LAYERS, LOGICAL), -1.0))


def watched(planner: EnginePlanner) -> CollectorRegistry:
    registry = CollectorRegistry()
    planner.telemetry = Telemetry(registry).of("tiny")
    return registry


def test_the_telemetry_shows_what_came_of_each_rebalance():
    planner = EnginePlanner(EngineOptions(history=1, planner={"min_gain": 0.05}))
    registry = watched(planner)
    sizes = {0: 100, 1: 10, 2: 1}
    loads, current, applied, moved_bytes = [traffic(8), traffic(8), traffic(8, 1)], start(), 0, 0
    for number, load in enumerate(loads, 1):
        planner.observe(load)
        placement = planner.place(TOPOLOGY, current)
        planner.conclude(lambda: sizes)
        report, values = planner.reports[-1], samples(generate_latest(registry))
        applied += not report.skipped
        moved = eplb.count_moves(current, placement, TOPOLOGY).tolist()
        moved_bytes += sum(n * sizes[layer] for layer, n in enumerate(moved))
        assert values["eplb_observed_balancedness_ratio{tiny}"] == report.observed
        assert values["eplb_predicted_balancedness_ratio{tiny}"] == report.predicted_after
        gap = lower_bound_gap(fold_steps(load.double(), 16), placement, TOPOLOGY)
        assert values["eplb_lower_bound_gap_ratio{tiny}"] == pytest.approx(gap)
        assert values["eplb_rebalances_total{tiny,applied}"] == applied
        assert values["eplb_rebalances_total{tiny,skipped}"] == number - applied
        assert values["eplb_experts_moved_total{tiny}"] == sum(item.moves for item in planner.reports)
        assert values["eplb_moved_bytes_total{tiny}"] == moved_bytes
        seconds = sum(item.plan_seconds for item in planner.reports)
        assert values["eplb_rebalance_seconds_total{tiny,plan}"] == pytest.approx(seconds)
        current = placement
    assert [report.skipped for report in planner.reports] == [False, True, False]


def test_the_telemetry_counts_what_failed_was_withdrawn_or_never_planned():
    planner = Raising()
    registry = watched(planner)
    planner.place(TOPOLOGY, start())  # without load
    planner.conclude()
    planner.conclude()  # an interval that was passed over before it came to a plan
    planner.observe(traffic(8))
    planner.place(TOPOLOGY, start())
    planner.conclude()
    planner.failures += 1  # another rank disagreed
    planner.conclude()
    values = samples(generate_latest(registry))
    assert values["eplb_rebalances_total{tiny,skipped}"] == 2
    assert values["eplb_rebalances_total{tiny,failed}"] == 2
    assert values["eplb_rebalances_total{tiny,applied}"] == 0
    assert not any("_ratio" in name for name in values)


def test_bytes_are_left_out_where_they_are_not_known(caplog):
    for expert_bytes in (None, dict, lambda: 1 / 0):
        planner = EnginePlanner()
        registry = watched(planner)
        planner.observe(traffic(8))
        planner.place(TOPOLOGY, start())
        planner.conclude(expert_bytes)
        assert not any("bytes" in name for name in samples(generate_latest(registry)))
    assert "ZeroDivisionError" in caplog.text
    weights = [
        torch.zeros(5, 3, 2, dtype=torch.bfloat16),
        torch.zeros(5),
        torch.zeros(5, 4, dtype=torch.int8),
    ]
    assert bytes_of_one_expert(weights) == 12 + 4 + 4
