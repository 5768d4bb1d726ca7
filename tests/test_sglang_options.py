"""The value of SGLang's `--eplb-algorithm`, which needs no SGLang to be understood."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

from eplb_plugin import ConfigError, PlannerOptions
from eplb_plugin.integration.common.options import EngineOptions
from eplb_plugin.integration.sglang.policy import ALGORITHMS, OPTIONS, is_ours, parse_algorithm

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in os.environ:
        if name.startswith("EPLB_PLUGIN_"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("algorithm", "ours"),
    [
        ("eplb_plugin", True),
        ("eplb_plugin:history=2", True),
        ("eplb_plugin:", True),
        ("ensemble", True),
        ("ensemble:history=2", True),
        ("eplb_plugins", False),
        ("ensemble_vec", False),
        ("deepseek", False),
        ("auto", False),
        ("", False),
    ],
)
def test_which_names_are_ours(algorithm, ours):
    assert is_ours(algorithm) is ours


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_plain_name_has_the_defaults(name):
    assert parse_algorithm(name) == EngineOptions()


def test_the_former_name_takes_the_same_options():
    options = "history=2,snapshots=8,move_price=0.05,policy=greedy"
    assert parse_algorithm(f"ensemble:{options}") == parse_algorithm(f"eplb_plugin:{options}")
    assert parse_algorithm(f"ensemble:{options}").planner.policy == "greedy"


def test_options_follow_the_colon():
    options = parse_algorithm(
        "eplb_plugin:move_price=0.05, max_moves=3,history=2,snapshots=8,check_agreement=false"
    )
    assert options == EngineOptions(
        planner=PlannerOptions(move_price=0.05, max_moves=3), history=2, snapshots=8, check_agreement=False
    )


def test_dispatch_is_the_engines_own_unless_it_is_named(tmp_path):
    assert (parse_algorithm("eplb_plugin").dispatch, parse_algorithm("eplb_plugin").expert_cost) == (
        "even",
        0,
    )
    options = parse_algorithm("eplb_plugin:dispatch=balanced,expert_cost=32")
    assert (options.dispatch, options.expert_cost) == ("balanced", 32)
    path = tmp_path / "options.yaml"
    path.write_text("rebalancer: {dispatch: balanced, expert_cost: auto}\n")
    options = parse_algorithm(f"eplb_plugin:config={path}")
    assert (options.dispatch, options.expert_cost) == ("balanced", "auto")


def test_metrics_are_enabled_like_the_other_options(monkeypatch):
    assert parse_algorithm("eplb_plugin:metrics=true") == EngineOptions(metrics=True)
    monkeypatch.setenv("EPLB_PLUGIN_METRICS__ENABLED", "true")
    assert parse_algorithm("eplb_plugin").metrics
    assert not parse_algorithm("eplb_plugin:metrics=false").metrics


def test_the_command_line_goes_over_the_environment_and_the_file(tmp_path, monkeypatch):
    path = tmp_path / "options.yaml"
    path.write_text("planner: {max_moves: 1, min_gain: 0.7, move_price: 0.5}\nrebalancer: {history: 9}\n")
    monkeypatch.setenv("EPLB_PLUGIN_PLANNER__MIN_GAIN", "0.8")
    monkeypatch.setenv("EPLB_PLUGIN_PLANNER__MAX_MOVES", "2")
    options = parse_algorithm(f"eplb_plugin:config={path},max_moves=3")
    assert options.planner == PlannerOptions(max_moves=3, min_gain=0.8, move_price=0.5)
    assert options.history == 9
    monkeypatch.setenv("EPLB_PLUGIN_CONFIG", str(path))
    assert parse_algorithm("eplb_plugin").planner == PlannerOptions(max_moves=2, min_gain=0.8, move_price=0.5)


def test_the_example_is_read():
    options = parse_algorithm(f"eplb_plugin:config={ROOT / 'configs' / 'sglang.yaml'}")
    assert options == EngineOptions(planner=PlannerOptions(max_moves=32))


def test_the_documentation_has_every_option_with_its_default():
    text = (ROOT / "docs" / "sglang.md").read_text(encoding="utf-8")
    documented = dict(re.findall(r"^\| `(\w+)` \| (.*?) ?\| ", text, re.MULTILINE))
    defaults = {**PlannerOptions().model_dump(), **EngineOptions().model_dump(), "config": ""}
    assert sorted(documented) == sorted(OPTIONS)
    for option, told in documented.items():
        assert (yaml.safe_load(told) if told else "") == defaults[option], option


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ("deepseek", "'deepseek' is not 'eplb_plugin'"),
        ("eplb_plugin:", "no option follows the colon"),
        ("ensemble:", "no option follows the colon"),
        ("ensemble:max_moves=x", r"max_moves: .* valid integer.* \(got 'x'\)"),
        ("eplb_plugin:history", "'history' is not OPTION=VALUE"),
        ("eplb_plugin:history=", "'history=' is not OPTION=VALUE"),
        ("eplb_plugin:history=2,", "'' is not OPTION=VALUE"),
        ("eplb_plugin:history=2,history=3", "history is given twice"),
        (
            "eplb_plugin:candidate=2",
            "unknown option 'candidate'; there are config, check_agreement, mode, policy",
        ),
        ("eplb_plugin:interval=5", "unknown option 'interval'"),
        ("eplb_plugin:history=0", r"history: .* greater than or equal to 1 \(got '0'\)"),
        ("eplb_plugin:move_price=cheap", r"move_price: .* valid number.* \(got 'cheap'\)"),
        ("eplb_plugin:check_agreement=perhaps", r"check_agreement: .* boolean"),
        ("eplb_plugin:dispatch=local_first", r"dispatch: .* 'even', 'engine' or 'balanced'"),
        ("eplb_plugin:expert_cost=-1", r"expert_cost.*: .* greater than or equal to 0"),
        ("eplb_plugin:config=/no/such.yaml", "/no/such.yaml: no such file"),
    ],
)
def test_what_is_wrong_is_named(algorithm, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_algorithm(algorithm)
    assert str(caught.value).startswith(f"--eplb-algorithm {algorithm}: ")


def test_a_wrong_file_is_named(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("planner: {moves: 3}\n")
    with pytest.raises(ConfigError, match=r"options\.yaml: unknown option planner\.moves"):
        parse_algorithm(f"eplb_plugin:config={path}")
