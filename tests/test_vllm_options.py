"""The plugin's options in vLLM, understood without vLLM; and that the example and the docs know them all."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from eplb_plugin import ConfigError, PlannerOptions
from eplb_plugin.integration.vllm.plugin import VllmOptions, vllm_options

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "vllm.yaml"


@pytest.fixture(autouse=True)
def _no_file(monkeypatch):
    monkeypatch.delenv("EPLB_PLUGIN_CONFIG", raising=False)


def test_without_anything_it_is_off():
    assert vllm_options({}) == vllm_options(None) == VllmOptions()
    assert not VllmOptions().enabled


def test_vllms_argument_is_taken_instead_of_the_files_section(tmp_path, monkeypatch):
    path = tmp_path / "vllm.yaml"
    path.write_text("eplb_plugin: {enabled: true, history: 7}\n")
    monkeypatch.setenv("EPLB_PLUGIN_CONFIG", str(path))
    assert vllm_options({"other": 1}) == VllmOptions(enabled=True, history=7)
    given = {"eplb_plugin": {"enabled": True, "planner": {"move_price": 0.05}}}
    assert vllm_options(given) == VllmOptions(enabled=True, planner=PlannerOptions(move_price=0.05))


def test_they_go_over_the_environment_and_that_over_the_files_other_sections(tmp_path, monkeypatch):
    path = tmp_path / "vllm.yaml"
    path.write_text(
        "planner: {min_gain: 0.3, move_price: 0.1, max_moves: 9}\nrebalancer: {history: 7, snapshots: 5}\n"
        "metrics: {enabled: true}\n"
    )
    monkeypatch.setenv("EPLB_PLUGIN_CONFIG", str(path))
    monkeypatch.setenv("EPLB_PLUGIN_PLANNER__MOVE_PRICE", "0.2")
    monkeypatch.setenv("EPLB_PLUGIN_PLANNER__MIN_GAIN", "0.4")
    given = {"eplb_plugin": {"enabled": True, "snapshots": 6, "planner": {"min_gain": 0.5}}}
    assert vllm_options(given) == VllmOptions(
        enabled=True,
        snapshots=6,
        history=7,
        metrics=True,
        planner=PlannerOptions(min_gain=0.5, move_price=0.2, max_moves=9),
    )
    assert vllm_options({}).planner == PlannerOptions(min_gain=0.4, move_price=0.2, max_moves=9)
    monkeypatch.setenv("EPLB_PLUGIN_BOGUS__X", "1")
    with pytest.raises(ConfigError, match="EPLB_PLUGIN_BOGUS__X"):
        vllm_options(given)


def test_the_least_cost_of_a_replica_is_tokens_or_auto():
    for cost in (0, 2**20, "auto"):
        assert vllm_options({"eplb_plugin": {"expert_cost": cost}}).expert_cost == cost
    for cost in (-1, 2**20 + 1, "free", 0.5, None):
        with pytest.raises(ConfigError, match="expert_cost"):
            vllm_options({"eplb_plugin": {"expert_cost": cost}})


@pytest.mark.parametrize("key", ["eplb-plugin", "EPLB_plugin"])
def test_a_name_that_is_almost_ours_is_refused(key):
    with pytest.raises(ConfigError, match=f"{key!r} is not known; the plugin's options are in 'eplb_plugin'"):
        vllm_options({key: {"enabled": True}})


def test_an_empty_section_is_an_error_only_where_it_is_no_section():
    assert vllm_options({"eplb_plugin": {}}) == VllmOptions()
    with pytest.raises(ConfigError, match="additional_config: eplb_plugin is True, not options with values"):
        vllm_options({"eplb_plugin": True})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enbled": True}, "enbled"),
        ({"snapshots": 0}, "snapshots: Input should be greater than or equal to 1 .got 0."),
        ({"planner": {"move_prize": 1}}, "move_prize"),
    ],
)
def test_wrong_options_are_named_with_where_they_come_from(options, message, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=message) as error:
        vllm_options({"eplb_plugin": options})
    assert str(error.value).startswith("additional_config: eplb_plugin: ")
    path = tmp_path / "vllm.yaml"
    path.write_text(yaml.safe_dump({"eplb_plugin": options}))
    monkeypatch.setenv("EPLB_PLUGIN_CONFIG", str(path))
    with pytest.raises(ConfigError, match=message) as error:
        vllm_options({})
    assert str(error.value).startswith("EPLB_PLUGIN_CONFIG: eplb_plugin: ")


def test_the_example_file_has_every_option_with_its_default(monkeypatch):
    section = yaml.safe_load(CONFIG.read_text())["eplb_plugin"]
    assert section == VllmOptions(enabled=True).model_dump(mode="json")
    monkeypatch.setenv("EPLB_PLUGIN_CONFIG", str(CONFIG))
    assert vllm_options({}) == VllmOptions(enabled=True)


def test_the_documentation_has_every_option_with_its_default():
    text = (ROOT / "docs" / "vllm.md").read_text()
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    table = {row[1].strip(): row[2].strip() for row in rows if len(row) > 4}
    defaults = VllmOptions().model_dump(mode="json")
    planner = {f"planner.{name}": value for name, value in defaults.pop("planner").items()}
    for name, value in (defaults | planner).items():
        assert table[f"`{name}`"] == yaml.safe_dump(value, default_flow_style=True).splitlines()[0], name
