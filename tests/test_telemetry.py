"""The series of a rebalance: the right numbers under the right names, served, and never in the way."""

from __future__ import annotations

import logging
import socket
from dataclasses import replace

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest

import eplb_plugin as eplb
from eplb_plugin.observability.prometheus import Telemetry, lower_bound_gap
from eplb_plugin.observability.server import MetricsServer
from eplb_plugin.planning.lower_bounds import peak_lower_bound
from eplb_plugin.runtime import rebalance as phases

from .processes import run_ranks
from .series import fetch, samples

LAYERS, LOGICAL, SLOTS = 2, 6, 8
ALONE = eplb.Topology(num_ranks=1, num_slots=SLOTS)
PAIR = eplb.Topology(num_ranks=2, num_slots=SLOTS)
OPTIONS = eplb.RebalancerOptions(mode="sync", interval=3, snapshots=3, history=1)
PHASES = ("gather", "plan", "transfer", "commit")


def counts(rank: int) -> torch.Tensor:
    """The two experts that share the first slots are hot: int64 [logical], tokens."""
    return torch.tensor([90, 60, 1, 1, 1, 1]) + rank


def hot_rank_start() -> eplb.Placement:
    return eplb.Placement(torch.tensor([[0, 1, 0, 1, 2, 3, 4, 5]]).repeat(LAYERS, 1), LOGICAL)


def serve_and_fetch(rank: int, interval: int) -> tuple[list[object], list[object], list[bool]]:
    """Reports, what rank 0 answered after each and after one more step, and whether there was a server."""
    balancer = eplb.Rebalancer(PAIR, LAYERS, LOGICAL, placement=hot_rank_start(), options=OPTIONS)
    server = eplb.serve_metrics(balancer, eplb.MetricsOptions(enabled=True, port=0), model="tiny")
    reports: list[object] = []
    fetched: list[object] = []
    for step in range(3 * interval + 1):
        for layer in range(LAYERS):
            if step < 2 * interval:
                balancer.record_counts(layer, counts(rank))
        report = balancer.step()
        reports += [report] if report else []
        if server and (report or step == 3 * interval):
            fetched.append(fetch(server.port))
    if server:
        server.close()
    return reports, fetched, [server is not None, balancer.observer is not None]


def test_the_first_rank_serves_what_the_reports_say():
    ranks = run_ranks(serve_and_fetch, 2, OPTIONS.interval)
    (reports, fetched, served), (_, _, served_elsewhere) = ranks
    assert served == [True, True]
    assert served_elsewhere == [False, False]
    first, second, third = reports
    assert not first.skipped
    assert first.moves > 0
    assert second.skipped
    assert third.reason == "no load was recorded"

    start, balanced, idle, later = fetched
    assert start["eplb_observed_balancedness_ratio{tiny}"] == first.balancedness_before
    assert start["eplb_predicted_balancedness_ratio{tiny}"] == first.balancedness_after
    assert first.balancedness_before < 0.6
    assert first.balancedness_after > 0.9
    assert balanced["eplb_observed_balancedness_ratio{tiny}"] == second.balancedness_before
    for number, values in enumerate(fetched[:3], 1):
        told = reports[:number]
        assert values["eplb_rebalances_total{tiny,applied}"] == 1
        assert values["eplb_rebalances_total{tiny,skipped}"] == number - 1
        assert values["eplb_rebalances_total{tiny,failed}"] == 0
        assert values["eplb_experts_moved_total{tiny}"] == first.moves
        assert values["eplb_steps_since_rebalance{tiny}"] == 0
        for phase in PHASES:
            seconds = sum(getattr(report, f"{phase}_seconds") for report in told)
            assert values[f"eplb_rebalance_seconds_total{{tiny,{phase}}}"] == pytest.approx(seconds)
    assert later["eplb_steps_since_rebalance{tiny}"] == 1
    # An interval without load says nothing about balance.
    for name in ("observed_balancedness", "predicted_balancedness", "lower_bound_gap"):
        assert idle[f"eplb_{name}_ratio{{tiny}}"] == balanced[f"eplb_{name}_ratio{{tiny}}"]
    load = torch.stack([counts(0) + counts(1)] * LAYERS)[None]
    assert start["eplb_lower_bound_gap_ratio{tiny}"] == pytest.approx(
        load.sum() / 2 / first.balancedness_after / peak_lower_bound(load.double(), PAIR).sum() - 1
    )


def test_the_gap_is_that_of_the_total_and_none_without_tokens():
    # Per rank 90 + 60 on the first, 4 on the second: the bound is the mean, 77, in either layer.
    load = torch.tensor([90.0, 60, 1, 1, 1, 1]).repeat(3, LAYERS, 1)
    ids = torch.tensor([[0, 1, 0, 1, 2, 3, 4, 5]]).repeat(LAYERS, 1)
    assert lower_bound_gap(load, eplb.Placement(ids, LOGICAL), PAIR) == pytest.approx(150 / 77 - 1)
    better = torch.tensor([[0, 1, 2, 3, 0, 1, 4, 5]]).repeat(LAYERS, 1)
    assert lower_bound_gap(load, eplb.Placement(better, LOGICAL), PAIR) == pytest.approx(0)
    assert lower_bound_gap(0 * load, eplb.Placement(ids, LOGICAL), PAIR) is None
    with pytest.raises(eplb.LoadError, match="7"):
        lower_bound_gap(torch.ones(1, LAYERS, 7), eplb.Placement(ids, LOGICAL), PAIR)


def watched() -> tuple[eplb.Rebalancer, CollectorRegistry]:
    registry = CollectorRegistry()
    balancer = eplb.Rebalancer(ALONE, LAYERS, LOGICAL, options=OPTIONS)
    balancer.observer = Telemetry(registry).of("tiny")
    return balancer, registry


def run_interval(balancer: eplb.Rebalancer) -> eplb.RebalanceReport:
    for step in range(OPTIONS.interval):
        balancer.record_counts(0, counts(step))
        report = balancer.step()
    assert report is not None
    return report


def test_nothing_is_shown_before_it_is_known():
    registry = CollectorRegistry()
    Telemetry(registry).of("tiny")
    values = samples(generate_latest(registry))
    assert {name for name, value in values.items() if value} == {"eplb_active{tiny}"}
    assert not any("_ratio" in name or "bytes" in name or "seconds" in name for name in values)
    assert "eplb_rebalances_total{tiny,failed}" in values


def test_failures_are_counted_and_turning_itself_off_is_shown(monkeypatch):
    balancer, registry = watched()
    monkeypatch.setattr(phases, "plan", lambda *_: 1 / 0)
    assert run_interval(balancer).failed
    values = samples(generate_latest(registry))
    assert values["eplb_rebalances_total{tiny,failed}"] == 1
    assert values["eplb_active{tiny}"] == 1
    monkeypatch.undo()
    assert not run_interval(balancer).failed

    def lost(*_, **__):
        raise eplb.RankLostError("a rank is gone")

    monkeypatch.setattr(phases, "relocate", lost)
    assert "a rank is gone" in run_interval(balancer).reason
    assert "a rank is gone" in balancer.off
    values = samples(generate_latest(registry))
    assert values["eplb_rebalances_total{tiny,failed}"] == 2
    assert values["eplb_active{tiny}"] == 0
    assert values["eplb_steps_since_rebalance{tiny}"] == 0


def test_a_rebalance_goes_on_when_its_figures_cannot_be_had(monkeypatch, caplog):
    balancer, registry = watched()
    monkeypatch.setattr("eplb_plugin.observability.prometheus.peak_lower_bound", lambda *_: 1 / 0)
    with caplog.at_level(logging.ERROR):
        reports = [run_interval(balancer) for _ in range(2)]
    assert not any(report.failed for report in reports)
    (record,) = caplog.records
    assert "metrics of tiny failed: ZeroDivisionError" in record.getMessage()
    # Nothing half done: what failed counts nowhere.
    assert samples(generate_latest(registry))["eplb_experts_moved_total{tiny}"] == 0
    monkeypatch.undo()
    run_interval(balancer)
    assert samples(generate_latest(registry))["eplb_observed_balancedness_ratio{tiny}"] == 1


def test_models_of_one_process_share_the_series():
    registry = CollectorRegistry()
    telemetry = Telemetry(registry)
    main, draft = telemetry.of("main"), telemetry.of("draft")
    assert telemetry.of("main") is main
    telemetry.stepped()
    draft.stepped()
    values = samples(generate_latest(registry))
    assert values["eplb_steps_since_rebalance{main}"] == 1
    assert values["eplb_steps_since_rebalance{draft}"] == 2


def test_metrics_are_off_by_default_and_a_taken_port_is_named():
    balancer = eplb.Rebalancer(ALONE, LAYERS, LOGICAL, options=OPTIONS)
    assert eplb.serve_metrics(balancer, eplb.MetricsOptions()) is None
    assert balancer.observer is None
    assert eplb.MetricsOptions().host == "127.0.0.1"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(eplb.ConfigError, match=f"metrics.port={port} on metrics.host=127.0.0.1"):
            eplb.serve_metrics(balancer, eplb.MetricsOptions(enabled=True, port=port))
    with pytest.raises(eplb.ConfigError, match="65536"):
        eplb.MetricsOptions(port=65536)


def test_a_closed_server_gives_its_port_back():
    server = MetricsServer(eplb.MetricsOptions(enabled=True, port=0))
    assert fetch(server.port) == {}
    server.close()
    again = MetricsServer(eplb.MetricsOptions(enabled=True, port=server.port))
    again.telemetry.of("tiny")
    assert fetch(again.port)["eplb_experts_moved_total{tiny}"] == 0
    again.close()


def test_an_observer_does_not_change_the_loop():
    balancer, _ = watched()
    plain = eplb.Rebalancer(ALONE, LAYERS, LOGICAL, options=OPTIONS)
    seconds = {f"{phase}_seconds": 0.0 for phase in PHASES}
    for _ in range(2):
        assert replace(run_interval(balancer), **seconds) == replace(run_interval(plain), **seconds)
