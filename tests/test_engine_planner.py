"""The planner as engines hold it: a history of its own, one answer on all ranks, and never an exception."""

from __future__ import annotations

import logging

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest

import eplb_plugin as eplb
from eplb_plugin.core.balancedness import balancedness
from eplb_plugin.core.load import fold_steps
from eplb_plugin.dispatch.rank_costs import split_balancedness
from eplb_plugin.dispatch.shares import VLLM_HASH, indexed_shares
from eplb_plugin.formats.recordings import read_recording, recorded_files
from eplb_plugin.integration.common.expert_bytes import bytes_of_one_expert
from eplb_plugin.integration.common.options import EngineOptions
from eplb_plugin.integration.common.planner import EnginePlanner
from eplb_plugin.integration.common.recording import ModelRecorder
from eplb_plugin.integration.common.shares import DispatchInForce, IndexMapping
from eplb_plugin.observability.prometheus import Telemetry, lower_bound_gap
from eplb_plugin.offline.synthetic_traffic import generate
from eplb_plugin.planning.move_cost import MoveCost
from eplb_plugin.planning.planner import plan
from eplb_plugin.runtime.control.rank_group import RankGroup

from .processes import run_ranks
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


def rebalance(planner, load, current=None, topology=TOPOLOGY, **more) -> torch.Tensor:
    """One rebalance of an interval, from the default placement unless told otherwise."""
    current = start().physical_to_logical if current is None else current
    return planner.rebalance(lambda: (load, topology), current, **more)


def test_it_plans_from_the_folded_intervals_that_it_has_seen():
    planner = EnginePlanner(EngineOptions(snapshots=4, history=2))
    steps = traffic(60)
    given, current = steps.clone(), start().physical_to_logical.clone()
    for part in steps.split(20):
        ids = rebalance(planner, part, current)
    assert torch.equal(steps, given)
    window = torch.cat([fold_steps(part, 4) for part in steps.split(20)[1:]])
    expected = eplb.plan(window, TOPOLOGY, start()).placement
    assert torch.equal(ids, expected.physical_to_logical)
    assert torch.equal(current, start().physical_to_logical)
    *_, report = planner.reports
    assert report.number == 3
    assert not report.skipped
    assert report.window_balancedness_before == pytest.approx(eplb.balancedness(window, start(), TOPOLOGY))
    assert report.window_balancedness_after == pytest.approx(eplb.balancedness(window, expected, TOPOLOGY))
    assert report.window_balancedness_after > report.window_balancedness_before
    last = fold_steps(steps[40:], 4)
    assert report.balancedness_before == pytest.approx(eplb.balancedness(last, start(), TOPOLOGY))
    assert report.balancedness_after == pytest.approx(eplb.balancedness(last, expected, TOPOLOGY))
    assert report.moves == eplb.plan(window, TOPOLOGY, start()).moves > 0


def test_ranks_that_make_the_same_calls_get_the_same_placements():
    trace = generate("glm-5.2", layers=2, steps=120).load
    topology = eplb.Topology(num_ranks=8, num_slots=288)
    planners = [EnginePlanner() for _ in range(2)]
    maps = [eplb.Placement.default(2, 256, 288).physical_to_logical] * 2
    for part in trace.split(40):
        maps = [
            rebalance(planner, part.clone(), ids, topology)
            for planner, ids in zip(planners, maps, strict=True)
        ]
        assert torch.equal(*maps)


def test_without_load_everything_stays(caplog):
    planner = EnginePlanner(model="moe")
    with caplog.at_level(logging.INFO):
        ids = rebalance(planner, torch.zeros(5, LAYERS, LOGICAL, dtype=torch.int32))
    assert torch.equal(ids, start().physical_to_logical)
    assert planner.reports[-1].reason == "no load was seen"
    assert caplog.messages == ["rebalance 1 of moe: skipped, no load was seen"]
    assert planner.failures == 0
    # A layer without load among others, a dense one, stays too.
    load = traffic(8)
    load[:, 1] = 0
    same = (rebalance(planner, load) == start().physical_to_logical).all(1)
    assert same.tolist() == [False, True, False]
    # So does everything after an idle interval, whatever the history.
    assert torch.equal(rebalance(planner, torch.zeros_like(load)), start().physical_to_logical)


def test_the_history_can_be_dropped_and_goes_when_the_group_changes():
    def fresh(load, topology=TOPOLOGY):
        return rebalance(EnginePlanner(), load, topology=topology)

    first, second = traffic(8), traffic(8, 1).roll(5, 2)
    planner = EnginePlanner()
    rebalance(planner, first)
    assert not torch.equal(rebalance(planner, second), fresh(second))
    planner.forget()
    assert torch.equal(rebalance(planner, second), fresh(second))
    wider = eplb.Topology(num_ranks=5, num_slots=20)
    assert torch.equal(rebalance(planner, first, topology=wider), fresh(first, wider))
    with pytest.raises(eplb.LoadError, match=r"\(4, 16\), the history \(3, 16\)"):
        planner.observe(torch.ones(2, LAYERS + 1, LOGICAL))


def test_what_gains_too_little_is_skipped(caplog):
    planner = EnginePlanner(EngineOptions(planner=eplb.PlannerOptions(min_gain=0.99)))
    with caplog.at_level(logging.INFO):
        assert torch.equal(rebalance(planner, traffic(8)), start().physical_to_logical)
    assert planner.reports[-1].reason == "no layer gains min_gain=0.99"
    (line,) = caplog.messages
    assert line.startswith("rebalance 1: skipped, no layer gains min_gain=0.99; balancedness 0.")


def test_one_line_says_what_a_rebalance_did(caplog):
    planner, silent = EnginePlanner(model="moe"), EnginePlanner(speaks=False)
    with caplog.at_level(logging.INFO):
        rebalance(planner, traffic(8))
        rebalance(silent, traffic(8))
    report = planner.reports[-1]
    assert caplog.messages == [
        f"rebalance 1 of moe: balancedness {report.balancedness_before:.3f} observed, "
        f"{report.window_balancedness_before:.3f} -> {report.window_balancedness_after:.3f} predicted; "
        f"{report.moves} moves in {report.layers} layers; planned in {1000 * report.plan_seconds:.1f} ms"
    ]


def test_the_price_follows_from_sizes_steps_and_options(caplog):
    """All of them are equal on all ranks, so the plans are."""
    sizes = dict.fromkeys(range(LAYERS), 10**8)
    load, current = traffic(8), start()
    slow = {"bandwidth": 1.0}
    for options, waits in (({}, True), (slow, True), ({**slow, "step_ms": 400}, False)):
        planner = EnginePlanner(EngineOptions(**options))
        caplog.clear()
        with caplog.at_level(logging.INFO):
            ids = rebalance(planner, load, expert_bytes=lambda: sizes, steps=lambda: 50, waits=waits)
        cost = MoveCost(
            expert_bytes=10**8,
            bandwidth=1e9 * options.get("bandwidth", 400),
            num_ranks=4,
            num_layers=LAYERS,
            step_seconds=options.get("step_ms", 40) / 1000,
            interval=50,
            serving_share=1.0 if waits else 0.1,
        )
        priced = eplb.PlannerOptions(move_price=cost.move_price(TOPOLOGY))
        expected = eplb.plan(fold_steps(load, 32), TOPOLOGY, current, priced)
        assert torch.equal(ids, expected.placement.physical_to_logical)
        report = planner.reports[-1]
        assert report.move_cost_seconds == pytest.approx(report.moves * cost.move_seconds)
        before, after = report.window_balancedness_before, report.window_balancedness_after
        assert report.gain_seconds == pytest.approx(cost.gain_seconds(before, after))
        spent, gain = 1000 * report.move_cost_seconds, 1000 * report.gain_seconds
        told = f"; moves cost {spent:.1f} ms and gain {gain:.1f} ms until the next one"
        assert caplog.messages[0].endswith(told)


def test_costs_are_left_out_where_they_are_not_known():
    for more in ({}, {"steps": lambda: 0, "expert_bytes": lambda: {0: 5}}, {"steps": lambda: 9}):
        planner = EnginePlanner()
        rebalance(planner, traffic(8), **more)
        report = planner.reports[-1]
        assert (report.move_cost_seconds, report.gain_seconds, report.failed) == (None, None, False)
        assert report.moves > 0


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


class Blind(EnginePlanner):
    def observe(self, interval_load):
        raise eplb.LoadError("the load cannot be read")


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        (Raising, "no plan today"),
        (Losing, "expert 3"),
        (Short, "planned in place of"),
        (Blind, "cannot be read"),
    ],
)
def test_a_planner_that_fails_keeps_the_placement_in_force(kind, cause, caplog):
    planner = kind()
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert torch.equal(rebalance(planner, traffic(8)), start().physical_to_logical)
    assert planner.failures == 3
    assert cause in planner.reports[-1].reason
    assert planner.reports[-1].failed
    (record,) = caplog.records
    assert cause in record.getMessage()
    assert record.getMessage().endswith("; the map in force stays; this is said once")
    assert record.exc_info
    with caplog.at_level(logging.INFO):
        rebalance(planner, traffic(8))
    assert caplog.messages[-1].startswith("rebalance 4: failed, ")
    assert caplog.messages[-1].endswith("; the map in force stays; 4 failures so far")


def test_whatever_the_inputs_raise_keeps_the_placement_in_force():
    planner = EnginePlanner()
    current = start().physical_to_logical
    assert torch.equal(planner.rebalance(lambda: 1 / 0, current), current)
    assert planner.reports[-1].reason == "ZeroDivisionError: division by zero"
    assert torch.equal(rebalance(planner, -traffic(8)), current)
    assert "LoadError" in planner.reports[-1].reason
    assert planner.failures == 2


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
        ids = rebalance(planner, load, current.physical_to_logical, expert_bytes=lambda: sizes)
        placement = eplb.Placement(ids, LOGICAL)
        report, values = planner.reports[-1], samples(generate_latest(registry))
        applied += not report.skipped
        moved = eplb.count_moves(current, placement, TOPOLOGY).tolist()
        assert report.bytes_moved == sum(n * sizes[layer] for layer, n in enumerate(moved))
        moved_bytes += report.bytes_moved
        assert values["eplb_observed_balancedness_ratio{tiny}"] == report.balancedness_before
        assert values["eplb_predicted_balancedness_ratio{tiny}"] == report.window_balancedness_after
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


def test_the_telemetry_counts_what_failed_or_was_never_planned():
    planner = Raising()
    registry = watched(planner)
    rebalance(planner, torch.zeros(1, LAYERS, LOGICAL))
    rebalance(planner, traffic(8))
    planner.rebalance(lambda: 1 / 0, start().physical_to_logical)
    values = samples(generate_latest(registry))
    assert values["eplb_rebalances_total{tiny,skipped}"] == 1
    assert values["eplb_rebalances_total{tiny,failed}"] == 2
    assert values["eplb_rebalances_total{tiny,applied}"] == 0
    assert not any("_ratio" in name for name in values)


def test_bytes_are_left_out_where_they_are_not_known(caplog):
    for expert_bytes in (None, dict, lambda: 1 / 0):
        planner = EnginePlanner()
        registry = watched(planner)
        assert not torch.equal(
            rebalance(planner, traffic(8), expert_bytes=expert_bytes), start().physical_to_logical
        )
        assert planner.reports[-1].bytes_moved is None
        assert not planner.failures
        assert not any("bytes" in name for name in samples(generate_latest(registry)))
    assert "reading the size of weights failed: ZeroDivisionError" in caplog.text
    weights = [
        torch.zeros(5, 3, 2, dtype=torch.bfloat16),
        torch.zeros(5),
        torch.zeros(5, 4, dtype=torch.int8),
    ]
    assert bytes_of_one_expert(weights) == 12 + 4 + 4


def test_ranks_that_differ_keep_the_placement_in_force_and_say_so():
    ranks = run_ranks(_differ, 2)
    for ids, report, message, values in ranks:
        assert ids == start().physical_to_logical.tolist()
        assert report.failed
        assert report.skipped
        assert report.reason == message
        assert (report.moves, report.layers, report.bytes_moved) == (0, 0, 0)
        assert report.balancedness_after == report.balancedness_before < 1
        assert report.window_balancedness_after == report.window_balancedness_before
        assert values["eplb_rebalances_total{tiny,failed}"] == 1
        assert values["eplb_experts_moved_total{tiny}"] == 0
    assert "one on ranks [0], another on ranks [1]" in ranks[0][2]


def _differ(rank: int) -> tuple[list[list[int]], eplb.RebalanceReport, str, dict[str, float]]:
    planner = EnginePlanner()
    registry = watched(planner)
    ids = rebalance(planner, traffic(8).roll(5 * rank, 2), ranks=RankGroup)
    message = "AgreementError: ranks planned different maps: one on ranks [0], another on ranks [1]"
    return ids.tolist(), planner.reports[-1], message, samples(generate_latest(registry))


def test_the_dispatch_is_measured_on_single_steps(caplog):
    caplog.set_level("INFO")
    planner = EnginePlanner(EngineOptions(dispatch="balanced"))
    load = traffic(12) + 1
    rebalance(planner, load, samples=lambda: 3 * load[:4])
    assert planner.reports[-1].sampled_balancedness is None  # the engine's own mapping is in force
    planner.dispatch = lambda: DispatchInForce(expert_cost=8, copies=3)
    steps = torch.cat([3 * load[:4], torch.zeros_like(load[:2])])
    ids = rebalance(planner, load, samples=lambda: steps)
    report, gain = planner.reports[-1], split_balancedness(load[:4], start(), TOPOLOGY, 8)
    assert report.sampled_balancedness_even == pytest.approx(gain.even)
    assert report.sampled_balancedness == pytest.approx(gain.balanced)
    assert f"single steps {gain.even:.3f} -> {gain.balanced:.3f} by dispatch" in caplog.text
    rebalance(planner, load, samples=lambda: steps[4:])
    assert planner.reports[-1].sampled_balancedness is None
    # A failure there is one of the rebalance.
    assert torch.equal(rebalance(planner, load, ids, samples=lambda: 1 / 0), ids)
    assert planner.reports[-1].failed


def test_plans_for_balanced_dispatch_are_made_from_single_steps():
    load = traffic(12) + 1
    folded = fold_steps(load, 32).double()
    even = plan(folded, TOPOLOGY, start()).placement.physical_to_logical
    for dispatch, expects in (("auto", "balanced"), ("balanced", "balanced"), ("even", "even")):
        options = EngineOptions(dispatch="balanced", planner={"dispatch": dispatch})
        planner = EnginePlanner(options)
        # The engine could not take the dispatch: the plan is for its own mapping.
        assert torch.equal(rebalance(planner, load, samples=lambda: load[:4]), even)
        planner = EnginePlanner(options)
        planner.dispatch = lambda: DispatchInForce(expert_cost=0, copies=1)
        expected = eplb.PlannerOptions(dispatch=expects)
        ids = rebalance(planner, load, samples=lambda: load[::3])
        wanted = plan(folded, TOPOLOGY, start(), expected, samples=load[::3]).placement
        assert torch.equal(ids, wanted.physical_to_logical)
        assert torch.equal(ids, even) == (expects == "even")
        ids = rebalance(planner, load, ids, samples=lambda: load[1::3])
        both, samples = torch.cat([folded, folded]), torch.cat([load[::3], load[1::3]])
        wanted = plan(both, TOPOLOGY, wanted, expected, samples=samples).placement
        assert torch.equal(ids, wanted.physical_to_logical)
    for wrong in ({"dispatch": "even"}, {"dispatch": "balanced", "samples": 0}):
        with pytest.raises(eplb.ConfigError, match=r"planner\.dispatch='balanced' needs"):
            EngineOptions(planner={"dispatch": "balanced"}, **wrong)


def observer(folder, **options):
    planner = EnginePlanner(EngineOptions(snapshots=4, **options), model="moe")
    planner.recorder = ModelRecorder(str(folder), 1, "an engine", "moe", (2, 4, 6), 2)
    return planner


def test_what_observes_reports_and_keeps_the_map(tmp_path, caplog):
    planner = observer(tmp_path, mode="observe")
    parts = traffic(60).split(20)
    with caplog.at_level(logging.INFO):
        for part in parts:
            ids = rebalance(
                planner,
                2 * part,
                samples=lambda part=part: 2 * part[::10],
                expert_bytes=lambda: {0: 10, 1: 10, 2: 40},
                steps=lambda: 20,
                step_seconds=0.5,
            )
            assert torch.equal(ids, start().physical_to_logical)
    for part, report in zip(parts, planner.reports, strict=True):
        expected = eplb.balancedness(fold_steps(part, 4), start(), TOPOLOGY)
        assert report.balancedness_before == report.balancedness_after == pytest.approx(expected)
        assert (report.moves, report.reason) == (0, "mode observe plans nothing")
    assert "skipped, mode observe plans nothing; balancedness 0." in caplog.text
    planner.recorder.files.flush()
    read = read_recording(tmp_path)
    assert torch.equal(read.trace.load, torch.cat(parts)), "each token once, step by step"
    assert torch.equal(read.trace.samples, torch.cat([part[::10] for part in parts]))
    newest = read.newest
    assert (newest.engine, newest.model, newest.layer_ids) == ("an engine", "moe", (2, 4, 6))
    assert (newest.expert_bytes, newest.steps, newest.step_seconds) == (20.0, 20, 0.5)
    assert (newest.placement, newest.topology) == (start(), TOPOLOGY)


def test_recording_beside_balancing_changes_no_plan(tmp_path):
    recording, plain = observer(tmp_path), EnginePlanner(EngineOptions(snapshots=4))
    ids = others = start().physical_to_logical
    for part in traffic(60).split(20):
        before = ids
        ids = rebalance(recording, part, ids, samples=lambda part=part: part[::5])
        others = rebalance(plain, part, others)
        assert torch.equal(ids, others)
    recording.recorder.files.flush()
    assert torch.equal(read_recording(tmp_path).newest.placement.physical_to_logical, before)


def test_recording_fails_alone(tmp_path, caplog):
    def broken():
        raise RuntimeError("no sizes today")

    planner = observer(tmp_path)
    for part in traffic(40).split(20):
        ids = rebalance(planner, part, expert_bytes=broken)
    assert planner.failures == 0
    assert not torch.equal(ids, start().physical_to_logical)
    assert caplog.text.count("recording moe failed: RuntimeError: no sizes today") == 1
    # An interval without load, or one that could not be read, is no interval.
    rebalance(planner, torch.zeros(5, LAYERS, LOGICAL, dtype=torch.int64))
    planner.rebalance(broken, start().physical_to_logical)
    planner.recorder.files.flush()
    assert recorded_files(tmp_path) == []


def test_balancedness_is_that_of_the_engines_own_mapping():
    """By vLLM's hash, with batches of 8 tokens of 4 experts each, that all ranks count."""
    scores = torch.rand(6, LAYERS, 8, LOGICAL, generator=torch.Generator().manual_seed(2))
    scores[..., :2] += 1  # hot experts
    chosen = scores.topk(4).indices
    steps = TOPOLOGY.num_ranks * torch.nn.functional.one_hot(chosen, LOGICAL).sum((2, 3))
    # Where replicas are 1, 2 or 4, the hash is even.
    row = torch.cat([torch.arange(LOGICAL), torch.tensor([0, 0, 1, 1])])
    before, planner = eplb.Placement(row.expand(LAYERS, -1), LOGICAL), EnginePlanner()
    planner.mapping = IndexMapping(VLLM_HASH, 4 * TOPOLOGY.num_ranks)
    ids = rebalance(planner, steps, before.physical_to_logical, samples=lambda: steps)
    (report,) = planner.reports
    window = fold_steps(steps, planner.options.snapshots)
    scores = []
    for placement in (before, eplb.Placement(ids, LOGICAL)):
        shares = indexed_shares(placement, torch.tensor([8]), VLLM_HASH)
        scores.append(balancedness(window, placement, TOPOLOGY, shares))
    assert [report.balancedness_before, report.balancedness_after] == pytest.approx(scores)
    assert scores[0] != pytest.approx(eplb.balancedness(window, before, TOPOLOGY))

    # Without single steps, replicas are taken to get equal shares.
    planner = EnginePlanner()
    planner.mapping = IndexMapping(VLLM_HASH, 4 * TOPOLOGY.num_ranks)
    rebalance(planner, steps)
    assert planner.reports[0].balancedness_before == eplb.balancedness(window, start(), TOPOLOGY)
