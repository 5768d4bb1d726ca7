"""Files of placements: what the engines read, and what is wrong with one."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from eplb_plugin.core.errors import EplbError, PlacementError, TopologyError, TraceError
from eplb_plugin.core.placement import Placement
from eplb_plugin.core.topology import Topology
from eplb_plugin.formats.placements import PLACEMENT_FORMATS, read_placement, write_placement

from .samples import (
    LAYERS,
)

TOPOLOGY = Topology(num_ranks=4, num_slots=8, num_nodes=2, num_groups=2)


def placement_of(layers=3):
    rows = [torch.cat([torch.randperm(6), torch.randperm(6)[:2]]) for _ in range(layers)]
    return Placement(torch.stack(rows), 6)


@pytest.mark.parametrize("form", PLACEMENT_FORMATS)
def test_placements_come_back_equal(tmp_path, form):
    torch.manual_seed(0)
    placement = placement_of()
    path = tmp_path / ("map.yaml" if form == "tensorrt-llm" else "map.json")
    write_placement(path, placement, LAYERS, TOPOLOGY, form)
    assert read_placement(path, 6, LAYERS) == placement
    assert read_placement(path, 6, (4,)) == Placement(placement.physical_to_logical[1:2], 6)
    with pytest.raises(TraceError, match="has no layer 9; it has"):
        read_placement(path, 6, (4, 9))
    with pytest.raises(PlacementError, match=r"outside 0\.\.4"):
        read_placement(path, 5, LAYERS)


@pytest.mark.parametrize("form", PLACEMENT_FORMATS)
def test_empty_slots_are_written_only_where_they_can_be(tmp_path, form):
    placement = Placement(torch.tensor([[0, 1, 2, 3, 4, 5, -1, -1]]), 6)
    path = tmp_path / "map"
    if form == "json":
        write_placement(path, placement, (3,), TOPOLOGY, form)
        assert read_placement(path, 6, (3,)) == placement
    else:
        with pytest.raises(PlacementError, match=f"layer 0, slot 6 is empty, which the format '{form}'"):
            write_placement(path, placement, (3,), TOPOLOGY, form)
        assert not path.exists()


@pytest.mark.parametrize("form", PLACEMENT_FORMATS)
def test_uneven_ranks_are_written_only_where_they_can_be(tmp_path, form):
    torch.manual_seed(0)
    placement, topology = placement_of(), Topology(num_ranks=3, num_slots=8, rank_slots=(4, 1, 3))
    path = tmp_path / "map"
    if form == "json":
        write_placement(path, placement, LAYERS, topology, form)
        content = json.loads(path.read_text())
        assert content["rank_slots"] == [4, 1, 3]
        assert read_placement(path, 6, LAYERS) == placement
        path.write_text(json.dumps(content | {"rank_slots": [4, 1, 4]}))
        with pytest.raises(TraceError, match="has 8 slots, rank_slots 9 in all"):
            read_placement(path, 6, LAYERS)
    else:
        with pytest.raises(TopologyError, match=r"no room for rank_slots=\(4, 1, 3\); json has"):
            write_placement(path, placement, LAYERS, topology, form)
        assert not path.exists()


def test_what_the_engines_read(tmp_path):
    torch.manual_seed(0)
    placement = placement_of()
    write_placement(tmp_path / "map.json", placement, LAYERS, TOPOLOGY, "sglang")
    rows = json.loads((tmp_path / "map.json").read_text())["physical_to_logical_map"]
    assert [len(row) for row in rows] == [8] * 7
    assert [rows[layer] for layer in LAYERS] == placement.physical_to_logical.tolist()
    assert rows[0] == rows[5] == [0, 1, 2, 3, 4, 5, 0, 1]
    write_placement(tmp_path / "map.yaml", placement, LAYERS, TOPOLOGY, "tensorrt-llm")
    content = yaml.safe_load((tmp_path / "map.yaml").read_text())
    assert content == {
        "num_slots": 8,
        "layer_updates_per_iter": 0,
        "initial_global_assignments": dict(zip(LAYERS, placement.physical_to_logical.tolist(), strict=True)),
    }


OURS = {
    "format": "eplb-plugin placement 1",
    "num_logical": 2,
    "num_ranks": 1,
    "num_nodes": 1,
    "num_groups": 1,
    "layer_ids": [0],
    "physical_to_logical": [[0, 1]],
}


# Of two rows for one layer, a reader would keep one.
TWICE = {"layer_ids": [4, 0, 4], "physical_to_logical": [[0, 1], [0, 1], [1, 0]]}


BAD_PLACEMENTS = {
    "layer twice": ("a.json", json.dumps(OURS | TWICE), r"a\.json: layer_ids repeated: \[4\]"),
    "layer below 0": (
        "a.json",
        json.dumps(OURS | {"layer_ids": [-3]}),
        r"a\.json: layer_ids below 0: \[-3\]",
    ),
    "yaml layer twice": (
        "a.yaml",
        "num_slots: 2\ninitial_global_assignments:\n  0: [0, 1]\n  3: [0, 1]\n  0x3: [1, 0]",
        r"a\.yaml: line 5: the key 3 is there twice",
    ),
    "yaml layer below 0": (
        "a.yaml",
        "num_slots: 2\ninitial_global_assignments: {0: [0, 1], -1: [0, 1]}",
        r"a\.yaml: layer_ids below 0: \[-1\]",
    ),
    "missing": ("a.json", None, r"^[^:]*a\.json: no such file$"),
    "folder": ("a.json", "FOLDER", r"/a\.json: is a folder, not a file$"),
    "folder npz": ("a.npz", "FOLDER", r"/a\.npz: is a folder, not a readable \.npz"),
    "truncated": ("a.json", json.dumps(OURS)[:-5], "neither JSON"),
    "empty": ("a.json", "", "neither JSON"),
    "list": ("a.json", "[1]", "valid dictionary|object"),
    "version": ("a.json", json.dumps(OURS | {"format": "2"}), "format: Input should be"),
    "other key": ("a.json", json.dumps(OURS | {"x": 1}), "x: Extra inputs"),
    "rows": ("a.json", json.dumps(OURS | {"layer_ids": [0, 1]}), "2 layer_ids for 1 rows"),
    "text": (
        "a.json",
        json.dumps(OURS | {"physical_to_logical": [[0, "1"]]}),
        "physical_to_logical.0.1: .*integer",
    ),
    "missing expert": (
        "a.json",
        json.dumps(OURS | {"physical_to_logical": [[0, 0]]}),
        "no slot for expert 1",
    ),
    "huge id": (
        "a.json",
        json.dumps(OURS | {"physical_to_logical": [[0, 10**20]]}),
        r"a\.json: layer 0 holds an expert of 67 bits",
    ),
    "negative id": ("a.json", json.dumps(OURS | {"physical_to_logical": [[0, -2]]}), "holds expert -2"),
    "sglang float": ("a.json", '{"physical_to_logical_map": [[0, 1.5]]}', "physical_to_logical_map.0.1: "),
    "sglang empty": ("a.json", '{"physical_to_logical_map": []}', "has no layer 0; it has none"),
    "sglang more": ("a.json", '{"physical_to_logical_map": [[0, 1]], "x": 1}', "x: Extra inputs"),
    "yaml broken": ("a.yaml", "num_slots: [", "not YAML"),
    "yaml object": ("a.yaml", "!!python/object/apply:os.system [ls]", "not YAML"),
    "yaml list": ("a.yaml", "[1, 2]", "valid dictionary"),
    "yaml slots": (
        "a.yaml",
        "num_slots: 3\ninitial_global_assignments: {0: [0, 1]}",
        "has 2 slots, num_slots=3",
    ),
    "yaml text": ("a.yaml", "num_slots: 2\ninitial_global_assignments: {0: [0, x]}", "assignments.0.1: "),
    "yaml no layers": ("a.yaml", "num_slots: 2", "initial_global_assignments: Field required"),
    "yaml bomb": (
        "a.yaml",
        "num_slots: 2\ninitial_global_assignments:\n  0: &row ["
        + "1, " * 20_000
        + "1]\n"
        + "".join(f"  {index}: *row\n" for index in range(1, 2000)),
        "holds more than the 2097152 values allowed",
    ),
}


@pytest.mark.parametrize("case", BAD_PLACEMENTS)
def test_malformed_placements_are_told(tmp_path, case):
    name, text, message = BAD_PLACEMENTS[case]
    if text == "FOLDER":
        (tmp_path / name).mkdir()
    elif text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(EplbError, match=message) as caught:
        read_placement(tmp_path / name, 2, (0,))
    assert "\n" not in str(caught.value)
