"""The command line: tables for people, JSON for programs, one clear line for errors."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

import eplb_plugin
from eplb_plugin.cli import app, arguments, console, main
from eplb_plugin.cli.loading import load_for
from eplb_plugin.config.sources import Settings, load_settings
from eplb_plugin.core.errors import ConfigError, TopologyError, TraceError
from eplb_plugin.formats.npz import save_load_trace
from eplb_plugin.offline.synthetic_traffic import generate
from eplb_plugin.offline.traces import LoadTrace

REAL = Path(__file__).resolve().parents[2] / "shared" / "traces"
ALL = ["--policy", "static", "--policy", "greedy", "--policy", "adaptive"]


@pytest.fixture(scope="module")
def load_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "load.npz"
    save_load_trace(path, generate("gpt-oss-20b", layers=2, steps=40, tokens_per_step=128, period=64))
    return str(path)


@pytest.fixture(scope="module")
def token_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "tokens.npz"
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 8, (300, 2, 2)).astype(np.uint8)
    category = np.array(["web", "code"] * 15)
    np.savez(path, topk_ids=ids, request=np.repeat(np.arange(30), 10), category=category, num_experts=8)
    return str(path)


def run(*args):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def last_json(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_simulate_compares_policies(load_file):
    result = run("simulate", load_file, "--ranks", 4, "--slots", 40, "--interval", 10, *ALL, "--json")
    rows = last_json(result)
    assert [row["policy"] for row in rows] == ["static", "greedy", "adaptive"]
    for row in rows:
        assert 0 < row["balancedness"] <= 1
        assert 0 <= row["moved_share"] <= 1
        assert row["plan_ms"] >= 0
        assert len(row["intervals"]) == 3
        assert f"{row['balancedness']:.4f}" in result.stdout
    assert rows[0]["moved_share"] == 0
    assert rows[0]["balancedness"] < rows[1]["balancedness"]
    assert "3 rebalances, one every 10 steps" in result.stdout


def test_simulate_compares_dispatches(load_file, tmp_path):
    some = ["--ranks", 4, "--slots", 40, "--interval", 10, "--policy", "adaptive", "--json"]
    alone = last_json(run("simulate", load_file, *some))
    assert "dispatches" not in alone[0]
    assert last_json(run("simulate", load_file, *some, "--dispatch", "even"))[0].keys() == alone[0].keys()
    flags = [word for name in ("even", "sampled", "balanced") for word in ("--dispatch", name)]
    result = run("simulate", load_file, *some, *flags, "--seed", 3)
    (row,) = last_json(result)
    even, sampled, balanced = row["dispatches"]
    assert even["balancedness"] == row["balancedness"] == alone[0]["balancedness"]
    assert even["balancedness"] < sampled["balancedness"] < balanced["balancedness"]
    assert even["cost_ratio"] == 1 > balanced["cost_ratio"]
    assert "slowest" not in result.stdout
    for item in row["dispatches"]:
        assert re.search(rf"{item['dispatch']} +{item['balancedness']:.4f}", result.stdout)
    assert "Each row of the load is taken for one batch" in " ".join(result.stdout.split())

    config = tmp_path / "config.yaml"
    config.write_text("simulate: {dispatches: [even, balanced], expert_cost: 8}\n")
    result = run("simulate", load_file, *some, "--config", config)
    (row,) = last_json(result)
    assert row["dispatches"][0]["cost_ratio"] == 1
    assert row["dispatches"][1]["cost_ratio"] < 1
    assert f"{row['dispatches'][1]['cost_ratio']:.3f}" in result.stdout
    assert max(len(line) for line in result.stdout.splitlines()[:-1]) <= 80


def test_dispatches_that_cannot_be_simulated(load_file):
    for flags, told in (
        (["--dispatch", "best"], "no dispatch 'best' to replay; there are even, balanced, sampled"),
        (["--expert-cost", 8], "--expert-cost is for a dispatch beside even: add --dispatch balanced"),
        (["--dispatch", "balanced", "--expert-cost", -1], "--expert-cost: Input should be greater"),
        (["--dispatch", "balanced", "--seed", 3], "--seed is of no use"),
    ):
        with pytest.raises(ConfigError, match=told):
            run("simulate", load_file, *flags)


def test_a_missing_argument_is_a_usage_error():
    assert run("simulate").exit_code == 2


def test_without_a_terminal_a_long_silence_is_explained(monkeypatch):
    """What the timer is asked to do, since nothing is to depend on how long anything takes."""
    timers = []

    class Recorded:
        def __init__(self, seconds, function, args, kwargs):
            self.call, self.state = (function, args, kwargs), "made"
            timers.append(self)

        def start(self):
            self.state = "started"

        def cancel(self):
            self.state = "cancelled"

    monkeypatch.setattr(console, "Timer", Recorded)
    said = io.StringIO()
    with console.compiling(Console(file=said), "testing"):
        (timer,) = timers
        assert timer.state == "started"
        assert said.getvalue() == ""
        function, args, kwargs = timer.call
        function(*args, **kwargs)
    assert timer.state == "cancelled"
    assert said.getvalue().count("\n") == 1
    assert "the first time it is compiled" in said.getvalue()
    with console.compiling(Console(file=said, force_terminal=True), "testing"):
        pass
    assert len(timers) == 1


def test_ranks_may_differ_in_slots(tmp_path, load_file):
    config = tmp_path / "config.yaml"
    config.write_text("simulate: {rank_slots: [14, 14, 9]}\n")
    flags = [word for slots in (14, 14, 9) for word in ("--rank-slots", slots)]
    by_flags, by_file = (
        run("simulate", load_file, "--interval", 4, "--json", *options)
        for options in (flags, ["--config", config])
    )
    assert "37 slots on 3 ranks" in " ".join(by_flags.stdout.split())
    first, second = (last_json(result) for result in (by_flags, by_file))
    assert [item["balancedness"] for item in first] == [item["balancedness"] for item in second]
    assert first[-1]["balancedness"] > first[0]["balancedness"]


def test_ranks_and_slots_beside_rank_slots_must_agree(tmp_path, load_file):
    flags = ["--rank-slots", 20, "--rank-slots", 20, "--interval", 10, "--policy", "static", "--json"]
    alone = last_json(run("simulate", load_file, *flags))
    assert (
        last_json(run("simulate", load_file, *flags, "--ranks", 2, "--slots", 40))[0]["balancedness"]
        == (alone[0]["balancedness"])
    )
    config = tmp_path / "c.yaml"
    config.write_text("simulate: {rank_slots: [20, 20], slots: null}")
    for command, options, message in (
        ("simulate", ["--ranks", 8, *flags], "--ranks 8 contradicts --rank-slots, which gives 2 ranks"),
        ("simulate", ["--slots", 41, *flags], "--slots 41 contradicts --rank-slots, which gives 40 slots"),
        ("plan", ["-o", tmp_path / "p.json", "--ranks", 8, *flags[:4]], "--ranks 8 contradicts --rank-slots"),
        (
            "simulate",
            ["--config", config, "--ranks", 4],
            r"--ranks 4 contradicts simulate\.rank_slots \(.*c\.yaml\), which gives 2 ranks; leave one",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            run(command, load_file, *options)
    # Nothing is given beside it, not even what the file leaves open.
    assert "40 slots on 2 ranks" in " ".join(
        run("simulate", load_file, "--config", config, "--interval", 10).stdout.split()
    )


def test_the_help_shows_a_form_of_rank_slots_that_works(load_file):
    commands = typer.main.get_command(app).commands
    for command in ("simulate", "plan"):
        (parameter,) = (item for item in commands[command].params if item.name == "rank_slots")
        example = re.search(r"(--rank-slots \d+ ?)+", parameter.help).group().split()
        assert len(example) == 6
        # The example is for fewer experts than the load has: it was parsed, and summed.
        with pytest.raises(TopologyError, match="do not fit into num_slots=13"):
            run(command, load_file, *example, *(["-o", "out.json"] if command == "plan" else []))


def test_the_price_of_moves_can_be_given(load_file):
    common = [load_file, "--ranks", 4, "--interval", 10, "--policy", "adaptive", "--json"]
    (free,) = last_json(run("simulate", *common, "--move-price", 0))
    (dear,) = last_json(run("simulate", *common, "--move-price", 1e6))
    assert dear["moved_share"] == 0 < free["moved_share"]


def test_the_price_of_moves_follows_from_the_size_of_an_expert(load_file):
    common = ["simulate", load_file, "--ranks", 4, "--interval", 10, "--policy", "adaptive", "--json"]
    (unknown,) = last_json(run(*common))
    (by_default,) = last_json(run(*common, "--move-price", 0.009))
    assert unknown["intervals"][0]["moves"] == by_default["intervals"][0]["moves"]
    large = run(*common, "--expert-mb", 1e6, "--move-price", "auto")
    assert "move_price is 0.128, for experts of 1e+06 MB and steps of 40 ms" in " ".join(large.stdout.split())
    (dear,), (by_hand,) = last_json(large), last_json(run(*common, "--move-price", 0.128))
    assert dear["moved_share"] == by_hand["moved_share"] < unknown["moved_share"]
    told = run(*common, "--expert-mb", 1e6, "--move-price", 0.009).stdout
    assert "move_price is" not in told


def test_every_default_is_in_the_help():
    commands = typer.main.get_command(app).commands
    for command in ("simulate", "plan", "report", "advise", "convert", "demo"):
        for parameter in commands[command].params:
            place = arguments.setting_of(parameter.name, "demo" if command == "demo" else "simulate")
            section, _, option = (place or "").partition(".")
            # Those that a command has its own default for say it in words.
            if not section or "default)" in parameter.help or parameter.name in ("interval", "metrics_port"):
                continue
            default = getattr(getattr(Settings(), section), option)
            shown = ", ".join(default) if isinstance(default, tuple) else str(default)
            assert parameter.show_default == (False if default is None else shown), parameter.name
    help_text = " ".join(run("simulate", "--help").stdout.replace("│", " ").split())
    assert "[default: (8)]" in help_text
    assert "[default: (static, greedy, adaptive)]" in help_text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["demo", "--steps", 1], "--steps: Input should be greater than or equal to 2 (got 1)"),
        (["demo", "--metrics-port", -1], "--metrics-port: Input should be greater"),
        (["simulate", "gpt-oss-20b", "--move-price", -1], "--move-price: Input should be greater"),
        (["plan", "gpt-oss-20b", "-o", "o.json", "--seed", -1], "--seed: Input should be greater"),
    ],
)
def test_wrong_values_are_told_by_the_option_as_typed(args, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        run(*args)
    assert str(caught.value).startswith("--")


def test_a_load_too_short_for_the_default_interval_gets_a_shorter_one(tmp_path, load_file):
    result = run("simulate", load_file, "--ranks", 4, "--policy", "static", "--json")
    (row,) = last_json(result)
    assert [part["first_step"] for part in row["intervals"]] == list(range(5, 40, 5))
    said = " ".join(result.stdout.split())
    assert "7 rebalances, one every 5 steps" in said
    assert "short for one every 1000; --interval sets another" in said
    # What is configured is kept, and named where it does not do.
    config = tmp_path / "c.yaml"
    config.write_text("rebalancer: {interval: 40}")
    with pytest.raises(TraceError, match=r"40 steps: with rebalancer.interval=40 \(.*c.yaml\) none"):
        run("simulate", load_file, "--config", config)
    one = tmp_path / "one.npz"
    save_load_trace(one, generate("gpt-oss-20b", layers=2, steps=1))
    with pytest.raises(TraceError, match="has 1 step: none is left to score"):
        run("simulate", one)


@pytest.mark.parametrize("command", ["simulate", "plan", "report", "advise", "convert"])
def test_a_load_without_tokens_is_none(tmp_path, command):
    path = tmp_path / "empty.npz"
    save_load_trace(path, LoadTrace(torch.zeros(20, 2, 8, dtype=torch.int32)))
    more = {"advise": ["--expert-mb", 3], "convert": [tmp_path / "o.csv"]}
    args = more.get(command, [] if command == "simulate" else ["-o", tmp_path / "o"])
    with pytest.raises(TraceError, match="holds no load: all 320 values are 0"):
        run(command, path, *args)
    assert list(tmp_path.iterdir()) == [path]


def test_options_of_no_use_are_refused(tmp_path, load_file, token_file):
    for args, message in (
        (
            [load_file, "--steps", 9],
            f"--steps is of no use for {load_file}, a recorded load; it is for a token",
        ),
        ([load_file, "--mode", "decode"], "--mode is of no use"),
        ([load_file, "--batch", 4], "--batch is of no use"),
        ([load_file, "--drift", 1], "--drift is of no use"),
        ([load_file, "--seed", 1], "--seed is of no use"),
        ([load_file, "--max-tokens", 9], "--max-tokens is of no use"),
        (["gpt-oss-20b", "--batch", 4], "--batch is of no use for gpt-oss-20b, generated traffic"),
        ([token_file, "--max-tokens", 9], "a token trace in decode mode; it is for a token trace in prefill"),
        ([token_file, "--mode", "prefill", "--seed", 9], "--seed is of no use"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            run("simulate", *args)
    # A file of options is for loads of any kind, and so are options for several loads.
    config = tmp_path / "c.yaml"
    config.write_text("simulate: {steps: 9, batch: 3, max_tokens: 4, policies: [static]}")
    assert run("simulate", load_file, "--config", config).exit_code == 0
    settings = load_settings(config, {"simulate.steps": 16})
    assert load_for(load_file, settings, alone=False).num_steps == 40


def test_without_json_there_is_none(load_file):
    result = run("simulate", load_file, "--ranks", 4, "--interval", 10, "--policy", "static")
    assert result.exit_code == 0
    assert "{" not in result.stdout
    # One spare slot per rank, where none are asked for.
    assert "32 experts in 36 slots on 4 ranks" in " ".join(result.stdout.split())


def test_simulate_decodes_and_prefills(token_file):
    common = ["--ranks", 2, "--slots", 10, "--interval", 8, "--policy", "static", "--json"]
    decode = ["--mode", "decode", "--batch", 4]
    (row,) = last_json(run("simulate", token_file, *common, *decode))
    assert sum(part["steps"] for part in row["intervals"]) == 7 * 8
    (row,) = last_json(run("simulate", token_file, *common, *decode, "--steps", 20))
    assert sum(part["steps"] for part in row["intervals"]) == 12
    (other,) = last_json(run("simulate", token_file, *common, *decode, "--steps", 20, "--seed", 1))
    assert other["balancedness"] != row["balancedness"]
    (row,) = last_json(run("simulate", token_file, *common, "--mode", "prefill", "--max-tokens", 25))
    assert sum(part["steps"] for part in row["intervals"]) == 15 - 8


def test_simulate_generated_traffic_with_groups_and_nodes():
    shape = ["--ranks", 8, "--slots", 264, "--nodes", 2, "--groups", 8]
    result = run("simulate", "deepseek-v3", *shape, "--interval", 4, "--steps", 8, "--policy", "greedy")
    assert result.exit_code == 0
    assert "deepseek-v3 (generated)" in result.stdout


def test_simulate_reads_a_configuration_file(tmp_path, load_file):
    path = tmp_path / "mine.yaml"
    path.write_text("simulate: {ranks: 4, slots: 36, policies: [static, greedy]}\nrebalancer: {interval: 20}")
    rows = last_json(run("simulate", load_file, "--config", path, "--slots", 40, "--json"))
    assert [row["policy"] for row in rows] == ["static", "greedy"]
    assert [part["first_step"] for part in rows[0]["intervals"]] == [20]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere.npz"], "nowhere.npz: no such file"),
        (["gpt-oss"], "gpt-oss: no such file, and no traffic profile; there are kimi-k2.5, deepseek-v3"),
        ([""], "the name of the load is empty"),
        (["deepseek-v3", "--policy", "best"], "no policy 'best'; there are static, adaptive, ensemble"),
        (["deepseek-v3", "--ranks", "0"], "--ranks: Input should be greater than or equal to 1 (got 0)"),
        (["deepseek-v3", "--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["gpt-oss-20b", "--steps", "8", "--interval", "8"], "has 8 steps: with --interval 8 none are left"),
        (
            ["gpt-oss-20b", "--steps", "8", "--ranks", "3", "--slots", "40"],
            "num_slots=40 is not divisible by num_ranks=3",
        ),
        (
            ["gpt-oss-20b", "--steps", "8", "--ranks", "3", "--slots", "30"],
            "num_slots=30",
        ),
    ],
)
def test_errors_are_one_line_and_exit_code_2(monkeypatch, capsys, args, message):
    monkeypatch.setattr(sys, "argv", ["eplb-plugin", "simulate", *args])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith("eplb-plugin: ")
    assert message in line


def test_the_version():
    assert run("--version").stdout.strip() == version("eplb-plugin") == eplb_plugin.__version__
    assert not hasattr(eplb_plugin, "__versions__")


def test_the_command_is_installed():
    command = Path(sys.executable).with_name("eplb-plugin")
    run = {"capture_output": True, "text": True, "timeout": 120}
    result = subprocess.run([command, "--help"], check=False, **run)
    assert result.returncode == 0
    assert "simulate" in result.stdout
    assert "demo" in result.stdout
    result = subprocess.run([command, "simulate", "nowhere.npz"], check=False, **run)
    assert result.returncode == 2
    assert result.stderr.strip() == "eplb-plugin: nowhere.npz: no such file"


@pytest.mark.skipif(not REAL.is_dir(), reason="no recorded traces beside the repository")
def test_simulate_on_recorded_traffic():
    trace = REAL / "deepseek_v2_lite_prefill_tokens.npz"
    common = ["--mode", "prefill", "--max-tokens", 1024, "--ranks", 8, "--slots", 72, "--interval", 4]
    static, greedy, ensemble = last_json(run("simulate", trace, *common, *ALL, "--json"))
    assert static["balancedness"] < min(greedy["balancedness"], ensemble["balancedness"])
    assert ensemble["moved_share"] < greedy["moved_share"]
