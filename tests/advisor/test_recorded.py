"""Advice on a recording: what it says of itself needs no option, and the rules against balancing are told."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import yaml
from typer.testing import CliRunner

from eplb_plugin.advisor.machine import model_preset, models_of_shape
from eplb_plugin.advisor.rules import how_to_enable, when_not
from eplb_plugin.cli import app
from eplb_plugin.core.balancedness import balancedness
from eplb_plugin.core.load import fold_steps
from eplb_plugin.core.placement import Placement
from eplb_plugin.core.topology import Topology
from eplb_plugin.formats.recordings import RecordedInterval, next_name, recorded_files, write_interval
from eplb_plugin.integration.sglang.policy import parse_algorithm
from eplb_plugin.integration.vllm.plugin import vllm_options
from eplb_plugin.offline.simulation import simulate
from eplb_plugin.offline.traces import LoadTrace

from .cases import advice_of, machine_of

TOPOLOGY = Topology(num_nodes=2, num_ranks=4, num_slots=36)


def steps_of(count, layers=2, experts=32):
    generator = torch.Generator().manual_seed(3)
    heat = torch.rand(1, layers, experts, generator=generator) ** 3
    return (2000 * heat * torch.rand(count, layers, experts, generator=generator)).long()


@pytest.fixture
def recording(tmp_path, monkeypatch):
    """Eight intervals of 24 steps, in sums of 3 steps, with 6 single steps each."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "recorded"
    folder.mkdir()
    record(folder, steps_of(8 * 24))
    return folder


def record(folder, steps, **changes):
    layers, experts = steps.shape[1:]
    for number, part in enumerate(steps.split(24), 1):
        known = {
            "placement": Placement.default(layers, experts, 36),
            "topology": TOPOLOGY,
            "expert_bytes": 10e6,
            "step_seconds": 0.025,
            "steps": 24,
            "engine": "vLLM",
            "model": "tiny",
        }
        interval = RecordedInterval(
            snapshots=fold_steps(part, 8).long(), samples=part[::4].clone(), **{**known, **changes}
        )
        write_interval(folder / next_name(1e9, number), interval)


def run(command, *args):
    result = CliRunner().invoke(app, [command, *[str(arg) for arg in args]])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def advise(folder, *args):
    out = run("advise", folder, "--json", *args)
    return " ".join(out.split()), json.loads(out.splitlines()[-1])


def test_a_recording_needs_no_option(recording):
    out, content = advise(recording)
    assert "64 sums of 3 steps, 2 layers, 32 experts of 10.0 MB on 4 ranks" in out
    assert "2 MoE layers of 32 experts fit no known model; an expert has 10 MB, as recorded." in out
    assert "A step took 25 ms, the median of the recording." in out
    assert content["worth_it"]
    best = content["best"]
    # An hour of intervals of sums of 3 steps of 25 ms.
    assert best["bytes_per_hour"] == pytest.approx(best["moves"] * 10e6 * 3600 / (best["interval"] * 0.075))
    assert f"a rebalance every {3 * best['interval']} steps" in out
    # One figure, in the table and in the verdict.
    assert f"MoE layers run {best['net']:.2f} times as fast" in out
    first = steps_of(8 * 24)[: 4 * 24 : 4]
    plain = Topology(num_nodes=2, num_ranks=4, num_slots=32)
    assert content["static"] == balancedness(first, Placement.default(2, 32, 32), plain)


def test_what_it_says_is_what_the_engine_takes(recording, tmp_path):
    _, content = advise(recording)
    eplb, ours = (yaml.safe_load(part) for part in content["enable"].split("'")[1::2])
    best = content["best"]
    assert eplb["num_redundant_experts"] == best["slots"] - 32
    assert eplb["step_interval"] == 3 * best["interval"]
    options = vllm_options(ours)
    assert options.enabled
    assert options.planner.move_price == best["move_price"]


def test_ranks_that_have_all_tokens_need_no_message(recording, tmp_path):
    out, _ = advise(recording, "--redundant", 4, "--interval", 24)
    assert "its message left out" in out
    record(recording, steps_of(8 * 24), copies=4)
    out, content = advise(recording, "--redundant", 4, "--interval", 24)
    assert "without a message, since every rank has all tokens" in out
    assert content["dispatch"]["worth_it"]
    assert '"dispatch": "balanced"' in content["enable"]


def test_options_win_over_the_recording(recording):
    out, content = advise(
        recording, "--ranks", 8, "--expert-mb", 3, "--step-ms", 50, "--interval", 12, "--redundant", 8,
        "--move-price", 0.009,
    )  # fmt: skip
    assert "of 3.0 MB on 8 ranks" in out
    assert "at 50 ms a step" in out
    assert {item["interval"] for item in content["tried"]} == {4}
    (best,) = content["tried"]
    assert best["bytes_per_hour"] == pytest.approx(best["moves"] * 3e6 * 3600 / (4 * 0.15))


def test_simulate_and_report_take_it_too(recording, tmp_path):
    steps = steps_of(8 * 24)
    arguments = ("simulate", recording, "--policy", "adaptive", "--interval", 24, "--json")
    assert "for experts of" in " ".join(run(*arguments).split())  # the price follows from their size
    out = run(*arguments, "--move-price", 0.009)
    (result,) = json.loads(out.splitlines()[-1])
    trace = LoadTrace(
        fold_steps(steps, 64).long(),
        samples=steps[::4],
        sample_steps=tuple(8 * (n // 6) + (n % 6) * 8 // 6 for n in range(48)),
    )
    assert result["balancedness"] == simulate(trace, TOPOLOGY, "adaptive", 8).balancedness
    assert "36 slots on 4 ranks" in " ".join(out.split())
    run("report", recording)
    page = (recording / "report.html").read_text(encoding="utf-8")
    assert "64 sums of 3 steps" in page
    run("report", recording, "-o", tmp_path / "other.html")
    # A file is a map as well.
    file = recorded_files(recording)[-1]
    assert "32 experts in 36 slots, 4 ranks on 2 nodes" in " ".join(run("report", "--map", file).split())
    run("convert", recording, tmp_path / "load.npz")


def test_single_steps_are_what_scores(recording):
    """Sums of steps hide how uneven a step is."""
    single = torch.ones(16, 1, 8, dtype=torch.int64)
    single[:, :, 0] = 13
    trace = LoadTrace(torch.full((32, 1, 8), 10), samples=single, sample_steps=tuple(range(0, 32, 2)))
    topology = Topology(num_ranks=4, num_slots=8)
    result = simulate(trace, topology, "static", 1)
    assert result.balancedness == pytest.approx(5 / 14)
    assert [item.scored for item in result.intervals][:4] == [0, 1, 0, 1]


def test_the_model_is_guessed_from_its_shape(recording):
    assert models_of_shape(24, 32) == ["gpt-oss-20b"]
    assert models_of_shape(60, 384) == ["kimi-k2", "kimi-k2.5"]
    assert models_of_shape(60, 384, model_preset("kimi-k2.5").bytes_per_expert) == ["kimi-k2.5"]
    assert models_of_shape(24, 33) == models_of_shape(24, 32, 1.0) == []
    record(recording, steps_of(8 * 24, layers=24), expert_bytes=0.0)
    out, content = advise(recording, "--interval", 24, "--redundant", 4, "--move-price", 0.01)
    assert "24 MoE layers of 32 experts, 13.2 MB each, are taken for gpt-oss-20b" in out
    assert content["best"]["replica_bytes"] == model_preset("gpt-oss-20b").bytes_per_expert * 24


@pytest.mark.parametrize(
    ("changes", "machine", "seconds", "rule"),
    [
        ({"static": 0.97}, {}, 0.0, "even traffic. Balancedness is 0.970"),
        ({"rank_load": 127.0}, {}, 0.0, "few tokens. A rank gets 127 tokens"),
        ({}, {"ranks": 16}, 0.0, "few experts. A rank has 2 of 32 experts"),
        (
            {},
            {"expert_cost": 400},
            0.0,
            "A slot gets 111.1 tokens a step; reading an expert takes as long as 400",
        ),
        ({}, {}, 599.0, "short recordings. The load covers 599 s"),
    ],
)
def test_rules_of_when_not_to_balance(changes, machine, seconds, rule):
    quiet = replace(advice_of(), rank_load=1000.0)
    assert (
        when_not(quiet, machine_of(ranks=2), 32, 0.0) == when_not(quiet, machine_of(ranks=2), 32, 600.0) == []
    )
    numbers = {"ranks": 4, **machine}
    experts = 64 if numbers["ranks"] == 4 else 32
    advice = replace(quiet, **changes)
    if experts == 64:
        best = replace(advice.best, setting=replace(advice.best.setting, slots=36))
        advice = replace(advice, best=best)
        experts = 33
    (said,) = when_not(advice, machine_of(**numbers), experts, seconds)
    assert rule in said
    assert said.endswith(")."), "a rule names its source"


def test_each_engine_gets_its_own_arguments():
    advice = replace(advice_of(), engine_steps=10.0)
    assert how_to_enable(advice, machine_of(), "SGLang", 32) == (
        "--enable-eplb --eplb-algorithm eplb_plugin:move_price=0.01 --ep-num-redundant-experts 4 "
        "--eplb-rebalance-num-iterations 80"
    )
    assert parse_algorithm("eplb_plugin:move_price=0.01").planner.move_price == 0.01
    assert '"step_interval": 80, "window_size": 80' in how_to_enable(advice, machine_of(), "vLLM", 32)
    alone, grouped = machine_of(nodes=1), machine_of(groups=4)
    assert "Topology(num_ranks=4, num_slots=36), " in how_to_enable(advice, alone, "", 32)
    assert "Topology(num_ranks=4, num_slots=36, num_nodes=2, num_groups=4), " in how_to_enable(
        advice, grouped, "", 32
    )
