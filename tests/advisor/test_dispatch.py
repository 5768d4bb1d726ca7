"""What `advise` says of dispatch: its gain is that of a replay, and its message is paid for."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from eplb_plugin.advisor.advice import advise
from eplb_plugin.advisor.dispatch import DispatchGain, dispatch_gain, dispatch_verdict
from eplb_plugin.advisor.machine import model_preset
from eplb_plugin.advisor.trial import Setting, TrialCache, try_setting
from eplb_plugin.advisor.verdict import verdict
from eplb_plugin.cli import app
from eplb_plugin.config.options import RebalancerOptions
from eplb_plugin.core.errors import ConfigError
from eplb_plugin.core.placement import Placement
from eplb_plugin.core.topology import Topology
from eplb_plugin.dispatch.accelerators import ACCELERATORS
from eplb_plugin.dispatch.expert_cost import cost_in_tokens, token_seconds
from eplb_plugin.formats.npz import save_load_trace
from eplb_plugin.offline.dispatch_replay import score
from eplb_plugin.offline.simulation import simulate
from eplb_plugin.offline.traces import LoadTrace

from .cases import PLANNER, REBALANCER, advice_of, machine_of, rated

LISTS = {"redundant": [4], "intervals": [8], "prices": [0.012]}


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def gain_of(**changes):
    numbers = {
        "expert_cost": 0,
        "first": 0.06,
        "second": 0.05,
        "layer_seconds": None,
        "message_seconds": 2e-5,
    }
    return DispatchGain(**{**numbers, **changes})


def test_costs_of_a_trial_are_those_of_the_simulation(steady):
    topology = Topology(num_ranks=4, num_slots=36)
    setting = Setting(36, 8, 0.012)
    trials = []
    for cost in (0, 40):
        trials.append(try_setting(steady, topology, setting, PLANNER, RebalancerOptions(expert_cost=cost)))
        result = simulate(
            steady,
            topology,
            "adaptive",
            8,
            planner=PLANNER.model_copy(update={"move_price": 0.012}),
            dispatches=("even", "balanced"),
            expert_cost=cost,
        )
        assert [trials[-1].even_cost, trials[-1].balanced_cost] == [item.cost for item in result.dispatches]
    assert trials[0].balanced_cost < 0.99 * trials[0].even_cost
    assert trials[1].even_cost > trials[0].even_cost
    cache = TrialCache(None)
    keys = {
        cache.key(steady, topology, setting, PLANNER, RebalancerOptions(expert_cost=cost)) for cost in (0, 40)
    }
    assert len(keys) == 2
    with pytest.raises(ConfigError, match="needs expert_cost in tokens, not 'auto'"):
        try_setting(steady, topology, setting, PLANNER, RebalancerOptions(expert_cost="auto"))


def test_the_gain_is_that_of_both_halves_and_the_time_of_a_layer_that_of_the_slowest_rank(steady):
    machine = machine_of(token_seconds=1e-7, message_seconds=2e-5)
    advice = advise(steady, machine, PLANNER, REBALANCER, **LISTS)
    trial, topology = advice.best.trial, Topology(num_nodes=2, num_ranks=4, num_slots=36)
    again = try_setting(LoadTrace(steady.load[32:]), topology, advice.best.setting, PLANNER, REBALANCER)
    gain = advice.dispatch
    assert gain.first == 1 - trial.balanced_cost / trial.even_cost
    assert gain.second == 1 - again.balanced_cost / again.even_cost
    # 512 tokens with 4 experts each, over 4 ranks.
    assert gain.layer_seconds == pytest.approx(512 * trial.even_cost * 1e-7)
    even = 512 * trial.even_cost * 1e-7
    balanced = 512 * trial.balanced_cost * 1e-7 + 2e-5
    assert advice.best.dispatched == pytest.approx(advice.best.net * even / balanced)
    assert not advice.message_left_out
    unknown = advise(steady, machine_of(message_seconds=2e-5), PLANNER, REBALANCER, **LISTS)
    assert unknown.message_left_out
    assert unknown.dispatch.layer_seconds is None
    assert unknown.best.dispatched == pytest.approx(advice.best.net * trial.even_cost / trial.balanced_cost)


def test_with_an_expert_cost_the_time_is_the_cost_of_the_slowest_rank(steady):
    machine = machine_of(expert_cost=40)
    advice = advise(steady, machine, PLANNER, REBALANCER, **LISTS)
    default, plain = Placement.default(2, 32, 32), Topology(num_nodes=2, num_ranks=4, num_slots=32)
    first, second = (
        score("even", half, default, plain, expert_cost=40) for half in (steady.load[:32], steady.load[32:])
    )
    assert advice.best.speedup == pytest.approx(
        first.peak_cost / first.mean_load / advice.best.trial.even_cost
    )
    assert advice.best.speedup != pytest.approx(advice.best.trial.balancedness / advice.static)
    assert advice.dispatch.expert_cost == 40
    topology = Topology(num_nodes=2, num_ranks=4, num_slots=36)
    again = try_setting(
        LoadTrace(steady.load[32:]),
        topology,
        advice.best.setting,
        PLANNER,
        REBALANCER.model_copy(update={"expert_cost": 40}),
    )
    assert advice.back_test.speedup == pytest.approx(second.peak_cost / second.mean_load / again.even_cost)


def test_loads_in_fractions_are_advised_on_without_dispatch(steady):
    means = LoadTrace(steady.load.double() / 8)
    advice = advise(means, machine_of(expert_cost=40), PLANNER, REBALANCER, **LISTS)
    assert advice.dispatch is None
    assert advice.best.dispatched is None
    assert advice.best.speedup == pytest.approx(advice.best.trial.balancedness / advice.static)
    assert any("Dispatch is not judged: the load has fractions" in line for line in verdict(advice, 32))


def test_when_the_message_pays():
    assert gain_of().break_even_seconds == pytest.approx(4e-4)
    assert gain_of().is_worth_it is None
    assert gain_of(layer_seconds=4.1e-4).is_worth_it is True
    assert gain_of(layer_seconds=3.9e-4).is_worth_it is False
    assert gain_of(message_seconds=0.0).is_worth_it is True
    assert gain_of(message_seconds=0.0).break_even_seconds == 0
    assert gain_of(second=0.005, layer_seconds=1.0).is_worth_it is False
    assert gain_of(first=0.0).break_even_seconds == float("inf")
    trial = rated(36, 1.0).trial
    assert (
        dispatch_gain(trial, trial, expert_cost=0, rank_load=1, token_seconds=None, message_seconds=0) is None
    )


@pytest.mark.parametrize(
    ("gain", "redundant", "told"),
    [
        (None, 4, "Dispatch is not judged"),
        (gain_of(), 0, "Dispatch has no choice: without redundant experts"),
        (gain_of(second=-0.002), 4, "Not worth another dispatch: dispatch balanced saves 6.0% and -0.2%"),
        (gain_of(message_seconds=0.0), 4, "Worth it: .* without a message, since every rank has all tokens"),
        (gain_of(), 4, "Worth it for long layers: .* 20 us for each layer and batch, pays .* above 400 us"),
        (gain_of(layer_seconds=5e-4), 4, "^Worth its message: .* take about 500 us; .* pays above 400 us"),
        (gain_of(layer_seconds=1e-4), 4, "^Not worth its message: .* take about 100 us; .* above 400 us"),
    ],
)
def test_what_is_said(gain, redundant, told):
    assert re.search(told, " ".join(dispatch_verdict(gain, redundant)))


def test_placement_and_dispatch_have_their_shares():
    best = replace(advice_of().best, dispatched=1.6)
    said = " ".join(verdict(replace(advice_of(), best=best, rated=(best,)), 32))
    assert "Placement gives 1.33 times. Dispatch balanced multiplies that by 1.20, to 1.60 times." in said
    said = " ".join(verdict(replace(advice_of(), best=best, rated=(best,), planned=1.7), 32))
    assert "With plans made for it, as engines make them, it reaches 1.70 times." in said
    alone = replace(best, setting=Setting(32, 8, 0.01))
    assert "Placement gives" not in " ".join(verdict(replace(advice_of(), best=alone, rated=(alone,)), 32))


def test_more_redundant_experts_may_pay_with_dispatch():
    advice = advice_of()
    more = replace(rated(48, 1.34), dispatched=1.5)
    assert not any("would reach" in line for line in verdict(advice, 32))
    said = verdict(replace(advice, rated=(*advice.rated, more)), 32)
    assert "With dispatch balanced, 16 redundant experts would reach 1.50 times." in said
    said = verdict(replace(advice, rated=(*advice.rated, more), message_left_out=True), 32)
    assert (
        "With dispatch balanced, 16 redundant experts would reach 1.50 times, its message left out." in said
    )
    best = replace(advice.best, dispatched=1.48)
    said = verdict(replace(advice, best=best, rated=(best, more)), 32)
    assert not any("would reach" in line for line in said)


def run(*args):
    result = CliRunner().invoke(app, ["advise", *[str(arg) for arg in args]])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def ask(path, *more):
    out = run(path, "--ranks", 4, "--interval", 8, "--move-price", 0, "--redundant", 4, *more, "--json")
    return out, json.loads(out.splitlines()[-1])


def test_the_command_takes_the_expert_cost_from_model_and_accelerator(tmp_path, monkeypatch, steady):
    path = tmp_path / "load.npz"
    save_load_trace(path, steady)
    preset, h100 = model_preset("gpt-oss-20b"), ACCELERATORS["H100 SXM"]
    tokens = cost_in_tokens(h100, preset.bytes_per_expert, preset.parameters)
    out, content = ask(path, "--model", "gpt-oss-20b", "--accelerator", "h100 sxm")
    assert content["expert_cost"] == content["dispatch"]["expert_cost"] == tokens == 39
    assert "expert_cost is 39 tokens: an expert of gpt-oss-20b (13.2 MB) on H100 SXM" in " ".join(out.split())
    seconds = 512 * content["best"]["even_cost"] * token_seconds(h100, preset.parameters)
    assert content["dispatch"]["layer_seconds"] == pytest.approx(seconds)
    assert content["dispatch"]["message_seconds"] == 2e-5
    assert f"{content['best']['dispatched']:.2f}" in out
    # The line of arguments is to be copied, and not broken.
    *told, _, _ = out.splitlines()
    assert told[-1] in ("Enable it with:", "To try it all the same:")
    assert max(map(len, told)) <= 80
    # The one that is found, and one that nobody knows.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    _, found = ask(path, "--model", "gpt-oss-20b")
    assert found["expert_cost"] == cost_in_tokens(
        ACCELERATORS["H200"], preset.bytes_per_expert, preset.parameters
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    out, other = ask(path, "--model", "gpt-oss-20b")
    assert other["expert_cost"] == 0
    assert "expert_cost is 0, tokens alone" in out
    assert other["dispatch"]["layer_seconds"] is other["dispatch"]["worth_it"] is None


def test_the_command_takes_the_expert_cost_and_the_message_that_it_is_told(tmp_path, steady):
    path = tmp_path / "load.npz"
    save_load_trace(path, steady)
    out, content = ask(path, "--expert-mb", 10, "--expert-cost", 25, "--tokens", "replicated")
    assert content["expert_cost"] == 25
    assert content["dispatch"]["message_seconds"] == content["dispatch"]["break_even_seconds"] == 0
    assert "expert_cost is 25 tokens, as given." in out
    _, content = ask(path, "--expert-mb", 10, "--message-us", 35)
    assert content["expert_cost"] == 0
    assert content["dispatch"]["message_seconds"] == 3.5e-5
    for flags, told in (
        (["--accelerator", "H9"], "no known accelerator is 'H9'; there are A100"),
        (["--accelerator", "H200"], "the parameters of an expert are unknown; give --model or --expert-cost"),
        (["--expert-cost", -1], "--expert-cost: Input should be greater"),
        (["--message-us", 0], "--message-us: Input should be greater than 0"),
        (["--tokens", "some"], "--tokens: Input should be 'sharded', 'own' or 'replicated'"),
    ):
        with pytest.raises(ConfigError, match=told):
            ask(path, "--expert-mb", 10, *flags)


def test_plans_for_dispatch_are_tried_with_the_best_setting(steady):
    advice = advise(steady, machine_of(), PLANNER, REBALANCER, **LISTS)
    best = advice.best
    first = LoadTrace(steady.load[: steady.num_steps // 2])
    made = try_setting(
        first,
        machine_of().topology(best.setting.slots),
        best.setting,
        PLANNER.model_copy(update={"dispatch": "balanced"}),
        REBALANCER.model_copy(update={"expert_cost": 0}),
    )
    assert advice.planned == pytest.approx(best.net * best.trial.even_cost / made.balanced_cost)
    asked = PLANNER.model_copy(update={"dispatch": "balanced"})
    assert advise(steady, machine_of(), asked, REBALANCER, **LISTS).planned is None
    none = {**LISTS, "redundant": [0]}
    assert advise(steady, machine_of(), PLANNER, REBALANCER, **none).planned is None
