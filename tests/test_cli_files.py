"""`convert` and `plan`: files in, files out."""

from __future__ import annotations

import errno
import json
import os
import sys

import pytest
import torch
from typer.testing import CliRunner

from eplb_plugin.cli import app, main
from eplb_plugin.config.options import PlannerOptions
from eplb_plugin.core.balancedness import balancedness, count_moves
from eplb_plugin.core.errors import TraceError
from eplb_plugin.core.load import fold_steps
from eplb_plugin.core.placement import Placement
from eplb_plugin.core.safe_files import written_whole
from eplb_plugin.core.topology import Topology
from eplb_plugin.formats.loads import read_trace
from eplb_plugin.formats.npz import save_load_trace
from eplb_plugin.formats.placements import read_placement
from eplb_plugin.offline.synthetic_traffic import generate
from eplb_plugin.offline.traces import LoadTrace
from eplb_plugin.planning.planner import plan


@pytest.fixture(scope="module")
def load_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "load.npz"
    trace = generate("gpt-oss-20b", layers=3, steps=40, tokens_per_step=128, period=64)
    save_load_trace(path, LoadTrace(trace.load, layer_ids=(1, 3, 5)))
    return path


def run(*args):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


def test_convert_goes_around_through_every_format(tmp_path, load_file):
    start = read_trace(load_file)
    chain = [
        (tmp_path / "a.csv", ["--first-layer", "0"]),
        (tmp_path / "b.pt", []),
        (tmp_path / "c.json", []),
        (tmp_path / "statistics", ["--to", "tensorrt-llm", "--top-k", "4", "--first-layer", "2"]),
        (tmp_path / "d.npz", []),
    ]
    source = load_file
    for path, options in chain:
        assert "40 steps, 3 layers, 32 experts" in run("convert", source, path, *options)
        source = path
    end = read_trace(source)
    assert torch.equal(end.load.int(), start.load)
    assert (start.layer_ids, end.layer_ids) == ((1, 3, 5), (2, 3, 4))


def test_convert_makes_loads_of_profiles(tmp_path):
    run("convert", "gpt-oss-20b", tmp_path / "load.npz", "--steps", 3, "--seed", 5)
    expected = generate("gpt-oss-20b", steps=3, seed=5).load
    assert torch.equal(read_trace(tmp_path / "load.npz").load, expected)


def test_plan_takes_profiles_and_how_they_are_drawn(tmp_path):
    run("plan", "gpt-oss-20b", "--steps", 3, "--seed", 5, "-o", tmp_path / "p.json")
    load = generate("gpt-oss-20b", steps=3, seed=5).load
    expected = plan(
        fold_steps(load, 128),
        Topology(num_ranks=8, num_slots=40),
        options=PlannerOptions(snapshot_decay=1.0, persistence=0.0),
    )
    assert read_placement(tmp_path / "p.json", 32, tuple(range(24))) == expected.placement


@pytest.mark.parametrize(
    ("form", "name"), [("json", "p.json"), ("sglang", "p.json"), ("tensorrt-llm", "p.yaml")]
)
def test_plan_writes_what_the_library_plans(tmp_path, load_file, form, name):
    shape = ["--ranks", 8, "--slots", 40, "--format", form]
    path = tmp_path / name
    out = run("plan", load_file, *shape, "-o", path)
    trace, topology = read_trace(load_file), Topology(num_ranks=8, num_slots=40)
    written = read_placement(path, 32, trace.layer_ids)
    default = Placement.default(3, 32, 40)
    before, after = (balancedness(trace.load, item, topology) for item in (default, written))
    assert after > before + 0.1
    assert f"default placement {before:.4f}" in out
    assert f"of the plan {after:.4f}" in out
    assert "none: a new start" in out

    # From a placement in force: what the library plans from it, and the moves that this takes.
    start = tmp_path / "start.json"
    run("plan", load_file, "--ranks", 8, "--slots", 40, "-o", start, "--config", _write(tmp_path, "greedy"))
    in_force = read_placement(start, 32, trace.layer_ids)
    out = run(
        "plan", load_file, *shape, "-o", path, "--current", start, "--config", _write(tmp_path, "adaptive")
    )
    written = read_placement(path, 32, trace.layer_ids)
    moves = int(count_moves(in_force, written, topology).sum())
    assert f"experts to move {moves} ({moves / 120:.1%} of the slots)" in out
    assert balancedness(trace.load, written, topology) >= balancedness(trace.load, in_force, topology)


def _write(folder, policy):
    path = folder / f"{policy}.yaml"
    path.write_text(f"planner: {{policy: {policy}}}")
    return path


def test_the_forecast_is_asked_for_and_options_count_wherever_they_come_from(tmp_path, load_file):
    shape = ["--ranks", 8, "--slots", 40]
    trace, topology = read_trace(load_file), Topology(num_ranks=8, num_slots=40)
    window = fold_steps(trace.load, 64)
    config, defaults = tmp_path / "c.yaml", tmp_path / "d.yaml"
    config.write_text("planner: {snapshot_decay: 0.5, persistence: 0.8}")
    defaults.write_text("planner: {snapshot_decay: 0.975, persistence: 0.7}")
    for decay, persistence, extra in (
        (1.0, 0.0, []),
        (1.0, 0.0, ["--config", config]),
        (0.975, 0.7, ["--forecast"]),
        (0.975, 0.7, ["--forecast", "--config", defaults]),
        (0.5, 0.8, ["--forecast", "--config", config]),
    ):
        run("plan", load_file, *shape, "-o", tmp_path / "p.json", *extra)
        options = PlannerOptions(snapshot_decay=decay, persistence=persistence)
        expected = plan(window, topology, options=options).placement
        assert read_placement(tmp_path / "p.json", 32, trace.layer_ids) == expected


def test_plan_says_for_whom_the_file_is(tmp_path, load_file):
    run(
        "plan", load_file, "--ranks", 8, "--slots", 40, "--nodes", 2, "--groups", 2, "-o", tmp_path / "p.json"
    )
    content = json.loads((tmp_path / "p.json").read_text())
    rows = content.pop("physical_to_logical")
    assert [len(row) for row in rows] == [40] * 3
    assert content == {
        "format": "eplb-plugin placement 1",
        "num_logical": 32,
        "num_ranks": 8,
        "num_nodes": 2,
        "num_groups": 2,
        "layer_ids": [1, 3, 5],
    }


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["convert", "LOAD", "out.xyz"], "out.xyz: its suffix names no format; there are npz (.npz)"),
        (
            ["convert", "LOAD", "out", "--to", "tensorrt-llm"],
            "out: the format tensorrt-llm names the experts",
        ),
        (["convert", "nowhere.pt", "out.csv"], "nowhere.pt: no such file"),
        (
            ["convert", "LOAD", "out.csv", "--to", "npz"],
            "out.csv: would hold the format npz under the suffix .csv",
        ),
        (["plan", "LOAD", "-o", "out.json", "--format", "x"], "no format 'x' of placements; there are json"),
        (["plan", "LOAD", "-o", "out.json", "--current", "no.json"], "no.json: no such file"),
        (
            ["plan", "LOAD", "-o", "out.json", "--ranks", "7", "--slots", "40"],
            "num_slots=40 is not divisible",
        ),
    ],
)
def test_errors_leave_no_file(monkeypatch, capsys, tmp_path, load_file, args, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(monkeypatch, capsys, load_file, *args)
    assert not list(tmp_path.iterdir())


def refused(monkeypatch, capsys, load_file, *args):
    """The last line on standard error."""
    monkeypatch.setattr(
        sys, "argv", ["eplb-plugin", *[str(load_file) if arg == "LOAD" else str(arg) for arg in args]]
    )
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


COMMANDS = {
    "plan": ["plan", "LOAD", "-o"],
    "report": ["report", "LOAD", "-o"],
    "convert": ["convert", "LOAD", "--to", "csv"],
    "statistics": ["convert", "LOAD", "--to", "tensorrt-llm", "--top-k", "4"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("output", ["", ".", "..", "/", "there"])
def test_no_file_replaces_a_folder(monkeypatch, capsys, tmp_path, load_file, command, output):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there" / "more").mkdir(parents=True)
    line = refused(monkeypatch, capsys, load_file, *COMMANDS[command], output)
    assert line.startswith(f"eplb-plugin: {output or '.'}: ")
    assert "empty" in line if command == "statistics" else "is a folder" in line


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_file_is_not_replaced(monkeypatch, capsys, tmp_path, load_file, command):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    line = refused(monkeypatch, capsys, load_file, *COMMANDS[command], pipe)
    assert line.startswith(f"eplb-plugin: {pipe}: ")
    assert list(tmp_path.iterdir()) == [pipe]
    assert pipe.is_fifo()


@pytest.mark.parametrize("command", ["plan", "report", "convert"])
def test_a_folder_that_is_missing_is_named(monkeypatch, capsys, tmp_path, load_file, command):
    path = tmp_path / "no" / "file"
    line = refused(monkeypatch, capsys, load_file, *COMMANDS[command], path)
    assert line == f"eplb-plugin: {path}: cannot be written: there is no folder {path.parent}"


def test_what_goes_wrong_while_writing_names_the_file_asked_for(tmp_path):
    def write(part):
        part.write_text("a")
        raise OSError(errno.ENOSPC, "No space left on device", str(part))

    path = tmp_path / "a.json"
    with pytest.raises(TraceError) as caught, written_whole(path) as part:
        write(part)
    assert str(caught.value) == f"{path}: cannot be written: No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_pictures_need_a_folder(monkeypatch, capsys, tmp_path, load_file):
    line = refused(
        monkeypatch, capsys, load_file, *COMMANDS["report"], tmp_path / "r.html", "--png", load_file
    )
    assert line == f"eplb-plugin: {load_file}: exists and is not a folder"
