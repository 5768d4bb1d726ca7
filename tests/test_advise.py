"""`advise`: what it predicts is what a replay measures, and it says so when that cannot be trusted."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from eplb_plugin.advisor import advice as advice_module
from eplb_plugin.advisor.advice import Advice, BackTest, Rated, advise, similarity
from eplb_plugin.advisor.cache import TrialCache
from eplb_plugin.advisor.machine import Cost, Machine
from eplb_plugin.advisor.models import model_preset, model_presets
from eplb_plugin.advisor.trial import Setting, Trial, try_setting
from eplb_plugin.advisor.verdict import is_worth_it, verdict
from eplb_plugin.cli import app, main
from eplb_plugin.config import PlannerOptions, RebalancerOptions
from eplb_plugin.errors import ConfigError, TopologyError, TraceError
from eplb_plugin.metrics import balancedness
from eplb_plugin.placement import Placement
from eplb_plugin.simulation import PolicySetup, policy_setup, simulate
from eplb_plugin.topology import Topology
from eplb_plugin.traces import LoadTrace, save_load_trace
from eplb_plugin.traffic import PROFILES, generate

REAL = Path(__file__).resolve().parents[2] / "shared" / "traces"
PLANNER, REBALANCER = PlannerOptions(), RebalancerOptions(history=2)


def machine_of(**changes):
    numbers = {"ranks": 4, "nodes": 2, "groups": 1, "bytes_per_expert": 1e7, "bandwidth": 4e11}
    return Machine(**{**numbers, "node_bandwidth": 5e10, "step_seconds": 0.05, **changes})


@pytest.fixture(scope="module")
def steady():
    return generate("gpt-oss-20b", layers=2, steps=64, tokens_per_step=512, drift=0, jitter=0.05)


@pytest.fixture(scope="module")
def changing():
    one, other = (
        generate("gpt-oss-20b", layers=2, steps=32, tokens_per_step=512, drift=0, seed=seed).load
        for seed in (1, 2)
    )
    return LoadTrace(torch.cat([one, other]), "changing")


def test_presets_have_sources_and_sizes():
    wanted = {"deepseek-v3", "qwen3-235b", "kimi-k2", "glm-4.5", "glm-5", "gpt-oss-120b", "llama-4-maverick"}
    assert wanted <= set(model_presets())
    for preset in model_presets().values():
        assert preset.source.startswith("https://huggingface.co/")
        assert preset.top_k <= preset.experts
        assert preset.experts % preset.groups == 0
    # 44 MB and 11 KB of scales; BF16 without any.
    assert model_preset("deepseek-v3").bytes_per_expert == pytest.approx(44_040_192 + 10_752, rel=1e-4)
    assert model_preset("qwen3-235b").bytes_per_expert == 3 * 4096 * 1536 * 2
    for name in set(model_presets()) & set(PROFILES):
        profile, preset = PROFILES[name], model_preset(name)
        assert (preset.layers, preset.experts, preset.top_k) == (
            profile.layers,
            profile.experts,
            profile.top_k,
        )
        assert preset.groups == profile.num_groups
    with pytest.raises(ConfigError, match="no model 'gpt-9'; there are deepseek-v3"):
        model_preset("gpt-9")


def test_a_trial_is_a_simulation_that_counts_what_ranks_send(steady):
    topology = Topology(num_nodes=2, num_ranks=4, num_slots=36)
    setting = Setting(slots=36, interval=8, move_price=0.003)
    trial = try_setting(steady, topology, setting, PLANNER, REBALANCER)
    placements = [Placement.default(2, 32, 36)]
    setup = policy_setup("ensemble", PlannerOptions(move_price=0.003))

    def watch(window, topology, current):
        placements.append(setup.policy(window, topology, current))
        return placements[-1]

    result = simulate(steady, topology, PolicySetup("watch", watch), 8, history=2)
    assert trial.balancedness == result.balancedness
    assert trial.rebalances == len(result.intervals) == 7
    assert trial.first_moves == result.intervals[0].moves > 0
    assert trial.moves == pytest.approx(sum(part.moves for part in result.intervals[1:]) / 6)
    # What one rank receives is what it had not held; no rank receives more than the busiest carries.
    received = []
    for old, new in pairwise(placements[1:]):
        held = [
            [set(row[rank * 9 : rank * 9 + 9]) for rank in range(4)]
            for place in (old, new)
            for row in place.physical_to_logical.tolist()
        ]
        received.append(max(sum(len(held[2 + i][r] - held[i][r]) for i in range(2)) for r in range(4)))
    assert trial.busiest_within + trial.busiest_between >= sum(received) / len(received) - 1e-9


def test_within_and_between_nodes_are_told_apart(steady):
    setting = Setting(slots=36, interval=32, move_price=0.0)
    one = try_setting(steady, Topology(num_ranks=4, num_slots=36), setting, PLANNER, REBALANCER)
    assert one.busiest_between == 0
    assert one.busiest_within > 0
    alone = Topology(num_nodes=4, num_ranks=4, num_slots=36)
    each = try_setting(steady, alone, setting, PLANNER, REBALANCER)
    assert each.busiest_within == 0
    assert each.busiest_between > 0


def test_costs_by_hand():
    trial = Trial(
        balancedness=0.9, rebalances=3, first_moves=50, moves=20.0, busiest_within=8.0, busiest_between=2.0
    )
    cost = machine_of().cost(trial, Setting(slots=40, interval=100, move_price=0.01), 32, 3)
    # An interval takes 5 s; 20 experts of 10 MB in each; 8 at 400 GB/s and 2 at 50 GB/s.
    assert cost.bytes_per_hour == pytest.approx(20 * 1e7 * 720)
    assert cost.transfer_seconds == pytest.approx(8e7 / 4e11 + 2e7 / 5e10)
    assert cost.transfer_share == pytest.approx(cost.transfer_seconds / 5)
    assert cost.replica_bytes == 2 * 3 * 1e7
    for name in ("bytes_per_expert", "bandwidth", "node_bandwidth", "step_seconds"):
        with pytest.raises(ConfigError, match=f"{name}=0"):
            machine_of(**{name: 0})


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
    setup = policy_setup("ensemble", PlannerOptions(move_price=best.move_price))
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


def rated(slots, net, hourly=1.0):
    cost = Cost(bytes_per_hour=hourly, transfer_seconds=0.0, transfer_share=0.0, replica_bytes=0.0)
    trial = Trial(
        balancedness=0.9, rebalances=2, first_moves=1, moves=1.0, busiest_within=0.0, busiest_between=0.0
    )
    return Rated(Setting(slots, 8, 0.01), trial, net, cost, net)


def test_replicas_and_moves_have_to_pay():
    best = advice_module._best
    # One percent is not worth the memory, three are; then half a percent is worth the moves.
    assert best([rated(32, 1.30), rated(64, 1.31)]).setting.slots == 32
    assert best([rated(32, 1.30), rated(64, 1.34)]).setting.slots == 64
    assert best([rated(32, 1.30, 9.0), rated(32, 1.299, 2.0), rated(32, 1.2, 1.0)]).cost.bytes_per_hour == 2
    assert best([rated(32, 1.30, 9.0), rated(32, 1.29, 2.0)]).cost.bytes_per_hour == 9


def test_a_second_run_repeats_nothing(steady, tmp_path, monkeypatch):
    cache = TrialCache(tmp_path / "trials")
    lists = {"redundant": [0, 4], "intervals": [8], "prices": [0.012]}
    first = advise(steady, machine_of(), PLANNER, REBALANCER, **lists, cache=cache)
    assert first.cached == 0
    assert len(list((tmp_path / "trials").iterdir())) == 3
    calls = []

    def watch(*args):
        calls.append(args[2])
        return try_setting(*args)

    monkeypatch.setattr(advice_module, "try_setting", watch)
    again = advise(steady, machine_of(), PLANNER, REBALANCER, **lists, cache=TrialCache(tmp_path / "trials"))
    assert calls == []
    assert again == replace(first, cached=3)
    # One more setting costs one more trial, whatever links and sizes are asked about.
    lists["redundant"] = [0, 4, 8]
    other = machine_of(bandwidth=1e9, bytes_per_expert=1e6)
    more = advise(steady, other, PLANNER, REBALANCER, **lists, cache=TrialCache(tmp_path / "trials"))
    assert calls[0] == Setting(40, 8, 0.012)
    assert len(calls) - (more.best.setting != first.best.setting) == 1


def test_whatever_matters_makes_another_key(steady):
    cache, topology = TrialCache(None), Topology(num_ranks=4, num_slots=36)
    setting = Setting(36, 8, 0.012)
    other_load = steady.load.clone()
    other_load[-1, -1, -1] += 1
    wide = LoadTrace(steady.load.reshape(32, 4, 32))
    arguments = [
        (steady, topology, setting, PLANNER, REBALANCER),
        (LoadTrace(other_load), topology, setting, PLANNER, REBALANCER),
        (LoadTrace(steady.load.long()), topology, setting, PLANNER, REBALANCER),
        (wide, topology, setting, PLANNER, REBALANCER),
        (steady, Topology(num_ranks=4, num_slots=36, num_nodes=2), setting, PLANNER, REBALANCER),
        (steady, topology, replace(setting, interval=9), PLANNER, REBALANCER),
        (steady, topology, setting, PlannerOptions(seed=1), REBALANCER),
        (steady, topology, setting, PLANNER, RebalancerOptions(history=3)),
    ]
    keys = [cache.key(*item) for item in arguments]
    assert len(set(keys)) == len(keys)
    same = LoadTrace(steady.load.clone(), "another name")
    assert cache.key(same, *arguments[0][1:]) == keys[0]


def test_a_damaged_or_locked_cache(tmp_path):
    cache = TrialCache(tmp_path)
    trial = rated(32, 1.0).trial
    cache.put("a", trial)
    assert cache.get("a") == trial
    for wrong in (b"", b"{}", b"\xff", b'{"balancedness": "high"}'):
        (tmp_path / "a.json").write_bytes(wrong)
        assert cache.get("a") is None
    assert cache.hits == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(TraceError, match="cannot be written"):
        TrialCache(tmp_path / "file").put("a", trial)
    assert TrialCache(None).get("a") is None


def advice_of(static=0.6, best=0.8, measured=0.8, test_static=0.6, alike=0.95, share=0.0):
    item = rated(36, 1.0)
    item = replace(
        item,
        trial=item.trial.model_copy(update={"balancedness": best}),
        speedup=best / static,
        cost=replace(item.cost, transfer_share=share),
        net=best / static * (1 - share),
    )
    return Advice(static, (item,), item, BackTest(best, measured, test_static, alike), 0)


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
    advise(LoadTrace(steady.load[:16]), machine_of(), PLANNER, REBALANCER, prices=[0.012])


def run(*args):
    result = CliRunner().invoke(app, ["advise", *[str(arg) for arg in args]])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command(tmp_path, monkeypatch, steady):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_load_trace(tmp_path / "load.npz", steady)
    ask = [
        tmp_path / "load.npz",
        "--ranks",
        4,
        "--expert-mb",
        10,
        "--interval",
        8,
        "--move-price",
        0,
        "--json",
    ]
    out = run(*ask, "--redundant", 0, "--redundant", 4)
    content = json.loads(out.splitlines()[-1])
    assert [item["slots"] for item in content["tried"]] == [32, 36]
    assert content["best"] in content["tried"]
    assert content["worth_it"]
    assert content["safe"]
    assert content["cached"] == 0
    assert " ".join(content["said"]) in " ".join(out.split())
    assert f"{content['tried'][1]['balancedness']:.4f}" in out
    # 4 redundant experts on 4 ranks: one more in each of 2 layers.
    assert content["tried"][1]["replica_bytes"] == 2 * 10e6
    again = json.loads(run(*ask, "--redundant", 0, "--redundant", 4).splitlines()[-1])
    assert again == {**content, "cached": 3}
    slow = json.loads(run(*ask, "--redundant", 4, "--bandwidth", 40).splitlines()[-1])
    assert slow["cached"] >= 1
    (here,) = slow["tried"]
    assert here["moves"] > 0
    assert here["transfer_seconds"] == pytest.approx(10 * content["tried"][1]["transfer_seconds"])
    assert here["net"] < content["tried"][1]["net"]


def test_profiles_know_their_model(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    few = ["--steps", 16, "--interval", 4, "--redundant", 0, "--move-price", 0, "--json"]
    content = json.loads(run("gpt-oss-20b", *few).splitlines()[-1])
    expected = model_preset("gpt-oss-20b").bytes_per_expert
    # 40 ms a step: 22500 rebalances an hour.
    assert content["best"]["bytes_per_hour"] == pytest.approx(content["best"]["moves"] * expected * 22500)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["LOAD"], "how large is an expert? Give --expert-mb, or --model with one of deepseek-v3"),
        (["LOAD", "--model", "x"], "no model 'x'"),
        (["LOAD", "--model", "glm-5", "--expert-mb", "3"], "both give the size of an expert"),
        (["LOAD", "--model", "glm-5"], "glm-5 has 256 experts"),
        (["LOAD", "--expert-mb", "0"], "bytes_per_expert=0.0 is not above 0"),
        (["LOAD", "--expert-mb", "9", "--ranks", "4", "--redundant", "3"], "num_slots=35 is not divisible"),
    ],
)
def test_errors_are_one_line(monkeypatch, capsys, tmp_path, steady, args, message):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    save_load_trace(tmp_path / "load.npz", steady)
    given = [str(tmp_path / "load.npz") if arg == "LOAD" else arg for arg in args]
    monkeypatch.setattr(sys, "argv", ["eplb-plugin", "advise", *given])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(not REAL.is_dir(), reason="no recorded traces beside the repository")
def test_recorded_traffic(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    few = ["--redundant", 8, "--move-price", 0.012, "--json"]
    decode = [
        REAL / "gpt_oss_20b_decode_tokens.npz",
        "--model",
        "gpt-oss-20b",
        "--steps",
        512,
        "--interval",
        64,
    ]
    content = json.loads(run(*decode, *few).splitlines()[-1])
    test = content["back_test"]
    assert content["safe"]
    assert abs(test["predicted"] - test["measured"]) < 0.02
    # In the order of the file, one kind of text follows the other.
    prefill = [
        REAL / "deepseek_v2_lite_prefill_tokens.npz",
        "--model",
        "deepseek-v2-lite",
        "--mode",
        "prefill",
    ]
    content = json.loads(run(*prefill, "--max-tokens", 256, "--interval", 4, *few).splitlines()[-1])
    assert content["back_test"]["similarity"] < 0.5
    assert not content["safe"]
