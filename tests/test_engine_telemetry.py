"""The series of an engine's worker: on its first rank alone, and collected by another process."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest

from eplb_plugin.core.topology import Topology
from eplb_plugin.integration.common.options import EngineOptions
from eplb_plugin.integration.common.telemetry import engine_telemetry
from eplb_plugin.integration.sglang import seams as sglang_seams
from eplb_plugin.integration.sglang.policy import SglangBalancer
from eplb_plugin.integration.vllm.policy import Interval
from eplb_plugin.integration.vllm.seams import expert_bytes, wrap_step
from eplb_plugin.integration.vllm.window import RingKeeper
from eplb_plugin.observability.prometheus import WARNING_CAUSES, Telemetry

from .processes import run_ranks
from .series import samples
from .test_vllm_policy import NUMBERS, call, in_force, policy, skewed


def test_only_the_first_rank_shows_anything_and_only_when_enabled(monkeypatch, caplog):
    telemetry = Telemetry(CollectorRegistry())
    monkeypatch.setattr("eplb_plugin.integration.common.telemetry._of_this_process", lambda: telemetry)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/somewhere")
    assert engine_telemetry(EngineOptions(), True) is None
    assert engine_telemetry(EngineOptions(metrics=True), False) is None
    with caplog.at_level(logging.WARNING):
        assert engine_telemetry(EngineOptions(metrics=True), True) is telemetry
        assert caplog.text == ""
        monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR")
        assert engine_telemetry(EngineOptions(metrics=True), True) is telemetry
        assert "started without PROMETHEUS_MULTIPROC_DIR" in caplog.text


# An engine's server collects what its workers wrote, the stages of a pipeline among them.
SERVER = """
import multiprocessing, sys
from prometheus_client import CollectorRegistry, generate_latest, multiprocess

def work(observed):
    from eplb_plugin.integration.common.options import EngineOptions
    from eplb_plugin.integration.common.telemetry import engine_telemetry
    from eplb_plugin import Placement, RebalanceReport, Topology
    import torch
    telemetry = engine_telemetry(EngineOptions(metrics=True), True)
    assert engine_telemetry(EngineOptions(metrics=True), True) is telemetry
    model = telemetry.of("moe")
    report = RebalanceReport(
        skipped=False, reason="", balancedness_before=observed, balancedness_after=0.8,
        window_balancedness_before=0.4, window_balancedness_after=0.9, layers=1, moves=3, bytes_moved=7,
        plan_seconds=0.25,
    )
    # Of 4 tokens, the first of two ranks gets 2 or 3: its peak is 0 or 0.5 above the bound.
    load = torch.tensor([[[1.0, 1, 1, 1]]]) if observed == 0.5 else torch.tensor([[[2.0, 1, 1, 0]]])
    model.rebalanced(report, load, Placement.default(1, 4, 4), Topology(num_ranks=2, num_slots=4))
    model.stepped()

if __name__ == "__main__":
    workers = [multiprocessing.get_context(how).Process(target=work, args=(observed,))
               for how, observed in (("spawn", 0.5), ("fork", 0.75))]
    for worker in workers:
        worker.start()
        worker.join()
        assert worker.exitcode == 0
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    sys.stdout.write(generate_latest(registry).decode())
"""


def test_a_server_collects_the_series_of_its_workers(tmp_path):
    program, folder = tmp_path / "server.py", tmp_path / "series"
    program.write_text(SERVER)
    folder.mkdir()
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    result = subprocess.run(
        [sys.executable, program], env=env, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr
    values = samples(result.stdout)
    assert values == {
        "eplb_active{moe}": 1,
        "eplb_observed_balancedness_ratio{moe}": 0.5,
        "eplb_predicted_balancedness_ratio{moe}": 0.9,
        "eplb_lower_bound_gap_ratio{moe}": 0.5,
        "eplb_steps_since_rebalance{moe}": 1,
        "eplb_rebalances_total{moe,applied}": 2,
        "eplb_rebalances_total{moe,skipped}": 0,
        "eplb_rebalances_total{moe,failed}": 0,
        "eplb_experts_moved_total{moe}": 6,
        "eplb_moved_bytes_total{moe}": 14,
        # Labels are sorted there.
        **{f"eplb_warnings_total{{{cause},moe}}": 0 for cause in WARNING_CAUSES},
        "eplb_rebalance_seconds_total{moe,plan}": 0.5,
    }


def test_vllms_policy_tells_what_came_of_each_call():
    registry, ours = CollectorRegistry(), policy()
    ours.telemetry = Telemetry(registry)
    model = SimpleNamespace(expert_weights=[[torch.zeros(3, 4), torch.zeros(3)]] * 3)
    ours.expect([Interval("moe", skewed(), expert_bytes=lambda: expert_bytes(model))])
    planned = ours.rebalance_experts(skewed().sum(0), *NUMBERS, in_force())
    call(ours, torch.zeros_like(skewed()), planned)
    ours.expect([Interval("moe", skewed(), error=RuntimeError("no memory for the window"))])
    ours.rebalance_experts(skewed().sum(0), *NUMBERS, planned)
    report = ours.planners["moe"].reports[0]
    values = samples(generate_latest(registry))
    assert [values[f"eplb_rebalances_total{{moe,{x}}}"] for x in ("applied", "skipped", "failed")] == [
        1,
        1,
        1,
    ]
    assert values["eplb_experts_moved_total{moe}"] == report.moves > 0
    assert values["eplb_moved_bytes_total{moe}"] == report.moves * 5 * 4
    assert values["eplb_observed_balancedness_ratio{moe}"] == report.balancedness_before


def test_vllms_steps_are_counted_but_for_profiling_ones():
    registry = CollectorRegistry()
    telemetry = Telemetry(registry)
    telemetry.of("main"), telemetry.of("draft")

    class State:
        def __init__(self) -> None:
            self.calls: list[tuple[object, ...]] = []
            self.model_states: dict[str, object] = {}

        def step(self, is_dummy=False, is_profile=False, log_stats=False):
            self.calls.append((is_dummy, is_profile, log_stats))

    state = State()
    wrap_step(state, RingKeeper(state), telemetry)
    state.step()
    state.step(True, log_stats=True)
    state.step(is_profile=True)
    assert state.calls == [(False, False, False), (True, False, True), (False, True, False)]
    values = samples(generate_latest(registry))
    assert values["eplb_steps_since_rebalance{main}"] == values["eplb_steps_since_rebalance{draft}"] == 2


def _rebalance_in_sglang(rank: int, algorithm: str) -> tuple[str, list[int], int]:
    """Two passes of SGLang's manager, the second one with a rebalance in which rank 1 differs."""
    registry = CollectorRegistry()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sglang_seams, "_model_name", lambda: "tiny")
        patch.setattr(
            "eplb_plugin.integration.common.telemetry._of_this_process", lambda: Telemetry(registry)
        )
        balancer = SglangBalancer(algorithm)
        model = SimpleNamespace(routed_experts_weights_of_layer={n: [torch.zeros(6, 4)] for n in range(3)})
        topology = Topology(num_ranks=4, num_slots=12)
        passes: list[int] = []

        def pass_ended() -> None:
            passes.append(len(passes))
            if len(passes) == 2:
                load = torch.roll(skewed(), 4 * rank, 2)
                moved = balancer.rebalance(load, topology, in_force()).physical_to_logical != in_force()
                passes.append(int(moved.sum()))

        manager = SimpleNamespace(on_forward_pass_end=pass_ended, _get_model=lambda: model)
        sglang_seams.watch(manager, balancer)
        for _ in range(2):
            manager.on_forward_pass_end()
        manager.on_forward_pass_end()
    return generate_latest(registry).decode(), passes, balancer.planner.reports[-1].moves


@pytest.mark.parametrize("check", ["true", "false"])
def test_sglangs_first_rank_shows_what_came_of_a_rebalance(check):
    algorithm = f"eplb_plugin:metrics=true,check_agreement={check}"
    (text, passes, moves), (elsewhere, _, _) = run_ranks(_rebalance_in_sglang, 2, algorithm)
    assert elsewhere == ""
    values = samples(text)
    assert values["eplb_steps_since_rebalance{tiny}"] == 1
    kept = check == "true"  # the ranks disagree, and know it
    assert (passes[2] == 0) == kept
    assert values["eplb_rebalances_total{tiny,failed}"] == kept
    assert values["eplb_rebalances_total{tiny,applied}"] == (not kept)
    assert values["eplb_experts_moved_total{tiny}"] == (0 if kept else moves)
    if not kept:
        assert values["eplb_moved_bytes_total{tiny}"] == moves * 4 * 4
