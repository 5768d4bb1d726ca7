"""Trials of one setting: what they measure, what that costs, and that none is made twice."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from eplb_plugin.advisor import advice as advice_module
from eplb_plugin.advisor.advice import advise
from eplb_plugin.advisor.machine import model_preset, model_presets
from eplb_plugin.advisor.trial import Setting, Trial, TrialCache, try_setting
from eplb_plugin.config.options import PlannerOptions, RebalancerOptions
from eplb_plugin.core.errors import ConfigError, TraceError
from eplb_plugin.core.placement import Placement
from eplb_plugin.core.topology import Topology
from eplb_plugin.offline.simulation import PolicySetup, policy_setup, simulate
from eplb_plugin.offline.synthetic_traffic import PROFILES
from eplb_plugin.offline.traces import LoadTrace

from .cases import PLANNER, REBALANCER, machine_of, rated


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
    setup = policy_setup("adaptive", PlannerOptions(move_price=0.003))

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
        (steady, topology, setting, PlannerOptions(min_gain=0.1), REBALANCER),
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
