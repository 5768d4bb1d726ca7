"""Commands on recordings: the recorded ranks, options over them, and the files that are left out."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from eplb_plugin.cli import app
from eplb_plugin.core.balancedness import balancedness
from eplb_plugin.core.placement import Placement
from eplb_plugin.core.topology import Topology
from eplb_plugin.formats.placements import read_placement
from eplb_plugin.formats.recordings import (
    RecordedInterval,
    next_name,
    read_recording,
    recorded_files,
    write_interval,
)

LAYERS, EXPERTS = 2, 8
EVEN = Topology(num_nodes=2, num_ranks=4, num_slots=12, num_groups=2)
UNEVEN = Topology(num_ranks=3, num_slots=12, rank_slots=(5, 5, 2))


def record(folder, topology, count=3, **changes):
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    there = len(recorded_files(folder))
    for number in range(there + 1, there + count + 1):
        known = {
            "snapshots": torch.randint(100, (8, LAYERS, EXPERTS), generator=generator),
            "samples": torch.randint(1, 9, (4, LAYERS, EXPERTS), generator=generator),
            "placement": Placement.default(LAYERS, EXPERTS, topology.num_slots),
            "topology": topology,
            "layer_ids": (3, 5),
            "steps": 80,
        }
        write_interval(folder / next_name(1e9, number), RecordedInterval(**{**known, **changes}))
    return folder


def run(*args):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def planned(tmp_path, *args):
    """What the file of `plan` says beside its rows, and the output on one line."""
    path = tmp_path / "p.json"
    out = run("plan", *args, "-o", path).stdout
    content = json.loads(path.read_text())
    rows = content.pop("physical_to_logical")
    names = ("num_ranks", "num_nodes", "num_groups", "rank_slots")
    return (len(rows[0]), *(content.get(name) for name in names)), " ".join(out.split())


def test_plan_takes_the_recorded_ranks(tmp_path):
    folder = record(tmp_path / "recorded", EVEN)
    for source in (folder, recorded_files(folder)[0]):
        found, out = planned(tmp_path, source)
        assert found == (12, 4, 2, 2, None)
        # The plan is made from sums, and scored on the single steps.
        recording = read_recording(source)
        made = read_placement(tmp_path / "p.json", EXPERTS, (3, 5))
        assert f"of the plan {balancedness(recording.trace.samples, made, EVEN):.4f}" in out
    numbered, _ = planned(tmp_path, folder, "--first-layer", 7)
    assert numbered == (12, 4, 2, 2, None)
    found, _ = planned(tmp_path, record(tmp_path / "uneven", UNEVEN))
    assert found == (12, 3, 1, 1, [5, 5, 2])


@pytest.mark.parametrize(
    ("topology", "options", "expected"),
    [
        (EVEN, ["--slots", 16], (16, 4, 2, 2, None)),
        (EVEN, ["--nodes", 1], (12, 4, 1, 2, None)),
        (EVEN, ["--groups", 1], (12, 4, 2, 1, None)),
        # With other ranks, slots and nodes are no longer the recorded ones: one spare slot for each rank.
        (EVEN, ["--ranks", 2], (10, 2, 1, 2, None)),
        (EVEN, ["--rank-slots", 6, "--rank-slots", 4], (10, 2, 1, 2, [6, 4])),
        (UNEVEN, ["--slots", 15], (15, 3, 1, 1, None)),
        (UNEVEN, ["--ranks", 3], (12, 3, 1, 1, None)),
    ],
)
def test_options_go_over_the_recorded_ranks(tmp_path, topology, options, expected):
    found, _ = planned(tmp_path, record(tmp_path / "recorded", topology), *options)
    assert found == expected


def test_every_command_names_the_files_that_it_leaves_out(tmp_path):
    # A name with brackets, which rich would take for markup.
    folder = record(tmp_path / "[bold]recorded", EVEN, 1, model="another")
    record(folder, EVEN)
    run("plan", folder, "-o", tmp_path / "map.json")
    (older,) = recorded_files(folder)[:1]
    newest = recorded_files(folder)[-1]
    newest.write_bytes(newest.read_bytes()[:100])
    unreadable, other = (
        f"1 file cannot be read, and is left out: {newest.name} (not a readable .npz (zip) file",
        f"1 older file is of another model, and left out: {older.name}",
    )
    commands = (
        ["simulate", folder, "--policy", "greedy"],
        ["plan", folder, "-o", tmp_path / "p.json"],
        ["convert", folder, tmp_path / "load.csv"],
        ["report", folder, "--policy", "greedy"],
        ["report", folder, "--map", tmp_path / "map.json"],
    )
    for command in commands:
        lines = run(*command).stderr.splitlines()
        assert sum(line.startswith(f"{folder}: {unreadable}") for line in lines) == 1, command
        assert lines.count(f"{folder}: {other}") == 1, command
    page = (folder / "report.html").read_text()
    assert unreadable in page
    assert f"{other}.</p>" in page


def test_a_map_without_ranks_gets_those_of_the_recording(tmp_path):
    path = tmp_path / "map.json"
    rows = Placement.default(LAYERS, EXPERTS, 12).physical_to_logical.tolist()
    path.write_text(
        json.dumps({"physical_to_logical_map": rows * 3})
    )  # the model's layers, 3 and 5 among them
    folders = {topology: record(tmp_path / str(topology.num_ranks), topology) for topology in (EVEN, UNEVEN)}

    def found(topology, *options):
        lines = run("report", "--map", path, folders[topology], *options, "--json").stdout.splitlines()
        content = json.loads(lines[-1])
        return content["ranks"], content["nodes"], content["balancedness"]

    assert found(EVEN)[:2] == (4, 2)
    assert found(EVEN, "--ranks", 6)[:2] == (6, 1)
    assert found(UNEVEN)[:2] == (3, 1)
    # Five experts of a rank have more tokens than four.
    assert found(UNEVEN)[2] < found(UNEVEN, "--ranks", 3)[2]


def test_advise_says_that_recorded_ranks_differ_in_slots(tmp_path):
    said = "The recorded ranks differ in slots; every setting tried here gives all ranks as many."
    for topology in (EVEN, UNEVEN):
        folder = record(tmp_path / str(topology.num_ranks), topology, 4)
        assert (said in " ".join(run("advise", folder, "--expert-mb", 1).stdout.split())) == (
            topology is UNEVEN
        )
