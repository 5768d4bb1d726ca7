"""The demo on real processes: it runs, its check can fail, and no rank can make it hang."""

from __future__ import annotations

import io
import json
import os
import signal
import time
import urllib.request

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from eplb_plugin.cli import app, demo
from eplb_plugin.cli.demo import ranks as ranks_module
from eplb_plugin.cli.demo import serving
from eplb_plugin.cli.demo.ranks import RankError, run_ranks
from eplb_plugin.cli.demo.serving import IntervalRecord
from eplb_plugin.config.options import DemoOptions
from eplb_plugin.config.sources import Settings
from eplb_plugin.core.errors import ConfigError, TopologyError, TraceError
from eplb_plugin.formats.npz import save_load_trace
from eplb_plugin.offline.synthetic_traffic import generate
from eplb_plugin.runtime.weights.transfer import Transfer

from .series import samples
from .test_demo_outcome import outcome_of, record

SMALL = {"ranks": 2, "layers": 2, "experts": 8, "slots": 10, "top_k": 2, "steps": 12, "interval": 4}
SMALL |= {"tokens": 64, "topics": 4, "period": 12, "time_limit": 100}


def quiet():
    return Console(stderr=True, quiet=True)


def run_small(**changes):
    return demo.run_demo(Settings(demo=DemoOptions(**{**SMALL, **changes})), quiet())


@pytest.mark.parametrize(("planning", "mode"), [("leader", "sync"), ("sharded", "async")])
def test_the_demo_balances_and_changes_no_output(planning, mode):
    settings = Settings(
        demo=DemoOptions(**SMALL),
        planner={"min_gain": 0, "move_price": 0.009},
        rebalancer={"planning": planning, "mode": mode, "interval": 1000},
    )
    outcome = demo.run_demo(settings, quiet())
    assert outcome.outputs_equal
    assert outcome.compared.wrong == outcome.wrong_slots == 0
    assert outcome.compared.tokens == 2 * 12 * 64
    assert outcome.compared.difference < 1e-4
    # In the background it may come too late for the few steps there are.
    assert outcome.balancedness >= outcome.balancedness_static
    assert outcome.balancedness > outcome.balancedness_static or mode == "async"
    assert [(part.first_step, part.steps) for part in outcome.intervals] == [(0, 4), (4, 4), (8, 4)]
    first, second, last = outcome.intervals
    assert first.balancedness_even == pytest.approx(first.balancedness_static, abs=0.03)
    assert all(part.balancedness >= part.balancedness_even - 0.005 for part in outcome.intervals)
    assert first.report is not None
    assert first.report.moves > 0
    # In the background the first one may still be under way when the second interval ends.
    assert second.report is not None or mode == "async"
    assert last.report is None
    expected = (second.balancedness + last.balancedness) / 2
    assert outcome.balancedness == pytest.approx(expected)


def test_another_dispatch_can_be_measured():
    outcome = run_small(dispatch="even")
    assert outcome.outputs_equal
    assert outcome.balancedness == pytest.approx(outcome.balancedness_even, abs=0.03)
    with pytest.raises(ConfigError, match="dispatch='nearest' is unknown"):
        run_small(dispatch="nearest")


def _serve_without_moving(rank, send, *args):
    """Serve with a transfer that switches the maps over, but leaves every weight where it was."""

    Transfer.commit = lambda self, layer: None
    serving.serve(rank, send, *args)


def test_the_check_fails_when_a_map_is_switched_without_its_weights(monkeypatch):
    monkeypatch.setattr(demo, "serve", _serve_without_moving)
    # Within the step, so that no steps are over before anything is switched.
    settings = Settings(demo=DemoOptions(**SMALL), rebalancer={"mode": "sync"})
    outcome = demo.run_demo(settings, quiet())
    assert not outcome.outputs_equal
    assert outcome.compared.wrong > 0.1 * outcome.compared.tokens
    assert outcome.wrong_slots > 0
    assert "OUTPUTS DIFFER" in outcome.summary()


def test_the_command_runs_with_a_trace(tmp_path):
    # Requests of one kind, then of another: the topics follow.
    path = tmp_path / "tokens.npz"
    ids = np.zeros((200, 1, 1), np.uint8)
    category = np.array(["web", "code"])
    np.savez(path, topk_ids=ids, request=np.repeat([0, 1], 100), category=category, num_experts=1)
    args = ["--trace", path, "--mode", "prefill", "--ranks", 2, "--layers", 1, "--experts", 8, "--slots", 10]
    args += ["--steps", 8, "--interval", 3, "--tokens", 32, "--seed", 1]
    result = CliRunner().invoke(app, ["demo", *map(str, args), "--json"])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout.splitlines()[-1])
    assert values["outputs_equal"] is True
    assert values["tokens_compared"] == 2 * 8 * 32
    assert "2 ranks, 1 layer, 8 experts in 10 slots" in result.stdout
    mix = demo._mix(DemoOptions(trace=str(path), mode="prefill", steps=8))
    np.testing.assert_allclose(mix, np.repeat([[0, 1], [1, 0]], 4, 0))
    mix = demo._mix(DemoOptions(trace=str(path), steps=8))
    assert mix.shape == (8, 2)
    np.testing.assert_allclose(mix.sum(1), 1)


def test_what_cannot_be_served_is_told_before_anything_starts(tmp_path):
    with pytest.raises(TopologyError, match="num_slots=9"):
        run_small(slots=9)
    with pytest.raises(TopologyError, match="num_logical=12"):
        run_small(experts=12)
    with pytest.raises(TopologyError, match="top_k=9 is above experts=8"):
        run_small(top_k=9)
    path = tmp_path / "load.npz"
    save_load_trace(path, generate("gpt-oss-20b", layers=1, steps=4))
    with pytest.raises(TraceError, match="holds loads only"):
        run_small(trace=str(path))


def _greet(rank, send, word):
    send(f"{word} {rank}")
    send(torch.distributed.get_world_size())


def _raise_on_one(rank, send):
    if rank == 1:
        raise ValueError("no such luck")
    torch.distributed.barrier()


def _die_on_one(rank, send):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()


def _sleep(rank, send):
    time.sleep(600)


def test_messages_of_all_ranks_arrive():
    messages = list(run_ranks(_greet, 2, ("hello",), time_limit=60))
    for rank in range(2):
        assert [message for sender, message in messages if sender == rank] == [f"hello {rank}", 2]
    assert len(messages) == 4


@pytest.mark.parametrize(
    ("body", "limit", "message"),
    [
        (_raise_on_one, 60, "rank 1 failed: ValueError: no such luck"),
        (_die_on_one, 60, "rank 1 died with exit code -9"),
        (_sleep, 4, r"ranks \[0, 1\] were still running, but none .* for 4 s \(demo.time_limit\)"),
    ],
)
def test_a_rank_that_fails_ends_all(body, limit, message):
    with pytest.raises(RankError, match=message):
        list(run_ranks(body, 2, (), time_limit=limit))


def test_the_limit_is_for_getting_no_further_and_not_for_the_whole(monkeypatch):
    limits = []

    def watched(connections, timeout):
        limits.append(timeout)
        # No process takes that long to start, and none is to be timed here.
        return real(connections, 60)

    real = ranks_module.wait
    monkeypatch.setattr(ranks_module, "wait", watched)
    list(run_ranks(_greet, 2, ("hello",), time_limit=7))
    assert set(limits) == {7}


def test_a_demo_that_fails_shows_what_it_has_measured(monkeypatch):
    def some_ranks(*args, **more):
        for rank in range(2):
            yield rank, record(0, [[4, 0], [2, 2]])
        raise RankError("rank 1 died")

    monkeypatch.setattr(demo, "run_ranks", some_ranks)
    said = io.StringIO()
    with pytest.raises(RankError, match="rank 1 died"):
        demo.run_demo(Settings(demo=DemoOptions(**SMALL)), Console(file=said, width=100))
    assert "0-1" in said.getvalue()


def _serve_and_scrape(rank, send, *args):
    """Serve, and fetch the metrics from outside each time that an interval is told."""

    def send_and_scrape(message):
        if isinstance(message, serving.MetricsReady):
            urls.append(message.url)
        if isinstance(message, IntervalRecord) and rank == 0:
            with urllib.request.urlopen(urls[0], timeout=10) as answer:
                send((message.interval, message.reports, answer.read().decode()))
        send(message)

    urls = []
    serving.serve(rank, send_and_scrape, *args)


def test_the_metrics_show_what_the_demo_prints(monkeypatch):
    """Acceptance: `curl` of /metrics during the demo."""
    scraped = []

    def watched_ranks(*args, **more):
        for rank, message in run_ranks(*args, **more):
            if isinstance(message, tuple):
                scraped.append(message)
            yield rank, message

    monkeypatch.setattr(demo, "serve", _serve_and_scrape)
    monkeypatch.setattr(demo, "run_ranks", watched_ranks)
    settings = Settings(
        demo=DemoOptions(**SMALL),
        planner={"min_gain": 0, "move_price": 0.009},
        rebalancer={"mode": "sync"},
        metrics={"enabled": True, "port": 0},
    )
    said = io.StringIO()
    outcome = demo.run_demo(settings, Console(file=said))
    assert "metrics at http://127.0.0.1:" in said.getvalue()
    assert len(scraped) == len(outcome.intervals) == 3
    values = {}
    for interval, reports, text in scraped:
        values = samples(text)
        printed = [item.report for item in outcome.intervals[: interval + 1] if item.report is not None]
        latest = printed[-1]
        assert values["eplb_observed_balancedness_ratio{demo}"] == latest.balancedness_before
        assert values["eplb_predicted_balancedness_ratio{demo}"] == latest.balancedness_after
        assert values["eplb_experts_moved_total{demo}"] == sum(item.moves for item in printed)
        assert values["eplb_moved_bytes_total{demo}"] == sum(item.bytes_moved for item in printed)
        applied = sum(not item.skipped for item in printed)
        assert values["eplb_rebalances_total{demo,applied}"] == applied
        assert values["eplb_rebalances_total{demo,skipped}"] == len(printed) - applied
        # The last interval ends without a rebalance, and without a step after its last batch.
        assert values["eplb_steps_since_rebalance{demo}"] == (0 if reports else SMALL["interval"] - 1)
    told = outcome.as_dict()
    assert values["eplb_rebalances_total{demo,applied}"] == told["rebalances"] > 0
    assert values["eplb_experts_moved_total{demo}"] == told["moves"] > 0
    assert values["eplb_moved_bytes_total{demo}"] == told["bytes_moved"] > 0
    # The metrics have the seconds of the first rank, the demo prints those of the slowest.
    mine = sum(report.plan_seconds for _, reports, _ in scraped for report in reports)
    assert values["eplb_rebalance_seconds_total{demo,plan}"] == pytest.approx(mine)
    assert mine <= told["plan_seconds"]


def test_a_metrics_port_enables_them(monkeypatch):
    given = []
    monkeypatch.setattr(
        demo, "run_demo", lambda settings, console: given.append(settings.metrics) or outcome_of()
    )
    assert CliRunner().invoke(app, ["demo", "--metrics-port", "9411"]).exit_code == 0
    assert CliRunner().invoke(app, ["demo"]).exit_code == 0
    assert [(options.enabled, options.host, options.port) for options in given] == [
        (True, "127.0.0.1", 9411),
        (False, "127.0.0.1", 9400),
    ]
