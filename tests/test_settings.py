"""Where options come from, which origin wins, and how wrong ones are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from eplb_plugin.config.options import DemoOptions, PlannerOptions, RebalancerOptions, SimulateOptions
from eplb_plugin.config.sources import (
    Settings,
    default_yaml,
    load_settings,
    read_section,
)
from eplb_plugin.core.errors import ConfigError
from eplb_plugin.core.safe_files import read_yaml
from eplb_plugin.integration.common.options import EngineOptions

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in os.environ:
        if name.startswith("EPLB_PLUGIN_"):
            monkeypatch.delenv(name)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_without_anything_all_is_default():
    settings = load_settings()
    assert settings.planner == PlannerOptions()
    assert settings.rebalancer == RebalancerOptions()
    assert settings.simulate == SimulateOptions()
    assert settings.demo == DemoOptions()
    assert settings.origins == {}


EXAMPLES = sorted(path for path in CONFIGS.glob("*.yaml") if path.name != "models.yaml")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_loads(path):
    settings = load_settings(path)
    # All that this one says is in a section of the adapter's.
    assert set(settings.origins.values()) == (set() if path.name == "vllm.yaml" else {str(path)})
    assert "#" in path.read_text(encoding="utf-8")


def test_the_default_file_says_what_the_models_say():
    path = CONFIGS / "default.yaml"
    told = "write eplb_plugin.config.sources.default_yaml() to configs/default.yaml"
    assert path.read_text(encoding="utf-8") == default_yaml(), told
    settings = load_settings(path)
    assert settings.model_dump() == Settings().model_dump()
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for section, field in Settings.model_fields.items():
        model = type(field.default)
        assert set(content[section]) == set(model.model_fields)
        assert all(option.description for option in model.model_fields.values()), section


def test_file_then_environment_then_command_line(tmp_path, monkeypatch):
    path = write(
        tmp_path / "a.yaml", "planner: {max_moves: 1, min_gain: 0.5}\ndemo: {steps: 9}\nsimulate: {slots: 40}"
    )
    monkeypatch.setenv("EPLB_PLUGIN_PLANNER__MAX_MOVES", "2")
    monkeypatch.setenv("EPLB_PLUGIN_DEMO__DRIFT", "0.25")
    monkeypatch.setenv("EPLB_PLUGIN_DEMO__LAYERS", "3")
    monkeypatch.setenv("EPLB_PLUGIN_REBALANCER__DISPATCH", "local_first")
    monkeypatch.setenv("EPLB_PLUGIN_SIMULATE__POLICIES", '["greedy"]')
    monkeypatch.setenv("EPLB_PLUGIN_SIMULATE__SLOTS", "null")
    settings = load_settings(path, {"demo.layers": 5, "demo.steps": None})
    assert (settings.planner.max_moves, settings.planner.min_gain) == (2, 0.5)
    assert (settings.demo.drift, settings.demo.layers, settings.demo.steps) == (0.25, 5, 9)
    assert settings.rebalancer.dispatch == "local_first"
    assert settings.simulate.policies == ("greedy",)
    assert settings.simulate.slots is None
    assert settings.origins["planner.max_moves"] == "environment variable EPLB_PLUGIN_PLANNER__MAX_MOVES"
    assert settings.origins["planner.min_gain"] == str(path)
    assert settings.origins["demo.layers"] == "command line"


def test_the_section_of_an_adapter_is_left_to_it(tmp_path, monkeypatch):
    path = tmp_path / "mine.yaml"
    path.write_text("eplb_plugin: {enabled: true}\nplanner: {max_moves: 3}")
    assert load_settings(path).origins == {"planner.max_moves": str(path)}
    monkeypatch.setenv("EPLB_PLUGIN_CONFIG", str(path))
    assert read_section("eplb_plugin") == {"enabled": True}
    assert read_section("nothing") is None


def test_the_environment_names_the_file(tmp_path, monkeypatch):
    path = write(tmp_path / "a.yaml", "planner: {max_moves: 1}")
    other = write(tmp_path / "b.yaml", "planner: {max_moves: 2}")
    monkeypatch.setenv("EPLB_PLUGIN_CONFIG", str(path))
    assert load_settings().planner.max_moves == 1
    assert load_settings(other).planner.max_moves == 2
    monkeypatch.setenv("EPLB_PLUGIN_CONFIG", str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        load_settings()


def test_an_empty_file_changes_nothing(tmp_path):
    assert load_settings(write(tmp_path / "a.yaml", "# nothing\n")) == Settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plan: {max_moves: 1}", "unknown section 'plan'; there are planner, rebalancer"),
        ("planner: {sede: 1}", "unknown option planner.sede; planner has policy"),
        ("planner: {max_moves: -1}", r"max_moves: Input should be greater than or equal to 0 \(got -1\)"),
        ("planner: {ensemble: {seed: -1}}", r"EnsembleOptions: seed: Input should be greater .* \(got -1\)"),
        ("planner: {ensemble: {sede: 1}}", r"EnsembleOptions: sede: Extra inputs are not permitted"),
        ("planner: {max_moves: 1.5}", "max_moves: "),
        ("planner: 5", "section 'planner' holds 5"),
        ("planner:", "section 'planner' holds None"),
        ("planner: {1: 2}", "has the option 1, not a name"),
        ("5: {a: 1}", "section 5 holds"),
        ("- planner", "holds a list"),
        ("planner: {max_moves: ", "not YAML"),
        ("planner: !!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_wrong_files_are_told_by_name(tmp_path, text, message):
    path = write(tmp_path / "wrong.yaml", text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_settings(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("EPLB_PLUGIN_PLANNER__SEDE", "1", "unknown option planner.sede"),
        ("EPLB_PLUGIN_PLAN__MAX_MOVES", "1", "unknown section 'plan'"),
        ("EPLB_PLUGIN_SEED", "1", "unknown; options are set as"),
        ("EPLB_PLUGIN_PLANNER", '{"seed": 1}', "unknown; options are set as"),
        ("EPLB_PLUGIN_PLANNER__MAX_MOVES__X", "1", "unknown; options are set as"),
        ("EPLB_PLUGIN_PLANNER__MAX_MOVES", "many", r"max_moves: .*\(got 'many'\)"),
        ("EPLB_PLUGIN_DEMO__RANKS", "0", r"ranks: .*\(got '0'\)"),
        ("EPLB_PLUGIN_SIMULATE__POLICIES", "greedy", "write lists as JSON"),
    ],
)
def test_wrong_variables_are_told_by_name(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message) as caught:
        load_settings()
    assert name in str(caught.value)


def test_a_wrong_value_is_blamed_on_the_origin_that_set_it(tmp_path, monkeypatch):
    path = write(tmp_path / "a.yaml", "planner: {max_moves: 1}")
    monkeypatch.setenv("EPLB_PLUGIN_PLANNER__MIN_GAIN", "0.4")
    with pytest.raises(ConfigError, match=r"^command line: section planner: .*persistence"):
        load_settings(path, {"planner.persistence": 2})


def test_making_settings_reads_no_environment(monkeypatch):
    monkeypatch.setenv("EPLB_PLUGIN_PLANNER__MAX_MOVES", "2")
    monkeypatch.setenv("EPLB_PLUGIN_NONSENSE", "2")
    assert Settings().planner.max_moves is None


def test_importing_the_package_ignores_the_environment():
    environment = {**os.environ, "EPLB_PLUGIN_NONSENSE": "1", "EPLB_PLUGIN_CONFIG": "/nowhere"}
    code = "import eplb_plugin, eplb_plugin.config.sources"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


def made(values):
    return [
        lambda: PlannerOptions(**values),
        lambda: PlannerOptions.model_validate(values),
        lambda: PlannerOptions.model_validate_json(json.dumps(values)),
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_moves": -1}, r"max_moves: Input should be greater than or equal to 0 \(got -1\)"),
        ({"sede": 1}, r"sede: Extra inputs are not permitted \(got 1\)"),
        ({"max_moves": True}, r"max_moves: Input should not be a bool \(got True\)"),
        ({"min_gain": True}, r"min_gain: Input should not be a bool \(got True\)"),
        ({"move_price": False}, r"move_price: Input should not be a bool \(got False\)"),
    ],
)
def test_wrong_values_are_told_alike_however_the_model_is_made(values, message):
    for make in made(values):
        with pytest.raises(ConfigError, match=f"^PlannerOptions: {message}$"):
            make()


def test_what_holds_no_values_is_told():
    for make in (lambda: PlannerOptions.model_validate(3), lambda: PlannerOptions.model_validate_json("3")):
        with pytest.raises(ConfigError, match=r"^PlannerOptions: Input should be .* \(got 3\)$"):
            make()
    with pytest.raises(ConfigError, match=r"^PlannerOptions: Invalid JSON"):
        PlannerOptions.model_validate_json("{")


def test_numbers_may_be_text_and_bools_are_for_switches():
    for make in made({"min_gain": "0.7", "max_moves": "0", "move_price": "0.5"}):
        options = make()
        assert (options.min_gain, options.max_moves, options.move_price) == (0.7, 0, 0.5)
    assert RebalancerOptions(dispatch="local_first").dispatch == "local_first"


def test_a_model_within_another_is_told_once():
    with pytest.raises(ConfigError, match=r"^EngineOptions: planner: PlannerOptions: max_moves: [^:]*$"):
        EngineOptions(planner={"max_moves": -1})


def test_settings_are_frozen():
    settings = load_settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.planner = PlannerOptions(max_moves=3)
    with pytest.raises(TypeError):
        settings.origins["planner.max_moves"] = "me"


def test_variables_hold_lists_and_nested_options_as_json(monkeypatch):
    monkeypatch.setenv("EPLB_PLUGIN_PLANNER__ENSEMBLE", '{"seed": 3}')
    monkeypatch.setenv("EPLB_PLUGIN_SIMULATE__RANK_SLOTS", "[5, 5, 3]")
    settings = load_settings()
    assert settings.planner.ensemble.seed == 3
    assert settings.simulate.rank_slots == (5, 5, 3)


def test_a_key_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    for text, line, key in (
        ("simulate: {ranks: 4, ranks: 8}", 1, "ranks"),
        ("simulate:\n  ranks: 4\nsimulate:\n  slots: 40\n", 3, "simulate"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=rf"c\.yaml: line {line}: the key '{key}' is there twice"):
            load_settings(path)
    # What is merged in from another mapping is not there twice.
    path.write_text("planner: &a {}\nsimulate: &b {<<: *a, ranks: 4}\nmetrics: {<<: [*a]}\n")
    assert load_settings(path).simulate.ranks == 4
    path.write_text("a: &a {x: 1, y: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, x: 3}\n")
    assert read_yaml(path, 1000, 100)["c"] == {"x": 3, "y": 1}
