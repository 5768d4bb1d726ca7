"""`eplb-plugin report --map`: counts against slow loops, every format, and the refusals."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from eplb_plugin.cli import app
from eplb_plugin.core.balancedness import balancedness
from eplb_plugin.core.errors import ConfigError, PlacementError, TopologyError, TraceError
from eplb_plugin.core.placement import Placement
from eplb_plugin.core.topology import Topology
from eplb_plugin.formats.npz import save_load_trace
from eplb_plugin.formats.placements import read_placement_file, write_placement
from eplb_plugin.offline.traces import LoadTrace
from eplb_plugin.report.replica_spread import replica_spread

EXPERTS, SLOTS, RANKS, LAYERS = 384, 416, 4, (3, 4)


def slow_counts(row, topology):
    """Repeats, experts on one rank, experts on one node, replicated experts: of one layer, by loops."""
    rank_of = [rank for rank, slots in enumerate(topology.slots_by_rank) for _ in range(slots)]
    places = {}
    for slot, expert in enumerate(row):
        if expert >= 0:
            places.setdefault(expert, []).append(rank_of[slot])
    per_node = topology.num_ranks // topology.num_nodes
    several = [ranks for ranks in places.values() if len(ranks) > 1]
    return (
        sum(len(ranks) - len(set(ranks)) for ranks in places.values()),
        sum(len(set(ranks)) == 1 for ranks in several),
        sum(len({rank // per_node for rank in ranks}) == 1 for ranks in several),
        len(several),
    )


@pytest.mark.parametrize("rank_slots", [None, (4, 1, 3, 8, 0, 2)])
@pytest.mark.parametrize("nodes", [1, 2, 3])
@pytest.mark.parametrize("empty", [0, 3])
def test_counts_are_those_of_slow_loops(rank_slots, nodes, empty):
    generator = torch.Generator().manual_seed(nodes + empty)
    topology = Topology(num_ranks=6, num_slots=18, num_nodes=nodes, rank_slots=rank_slots)
    for _ in range(20):
        rows = []
        for _ in range(3):
            spare = torch.randint(0, 7, (18 - 7 - empty,), generator=generator)
            row = torch.cat([torch.arange(7), spare, torch.full((empty,), -1)])
            rows.append(row[torch.randperm(18, generator=generator)])
        spread = replica_spread(Placement(torch.stack(rows), 7), topology)
        found = zip(spread.repeats, spread.on_one_rank, spread.on_one_node, spread.replicated, strict=True)
        expected = [slow_counts(row.tolist(), topology) for row in rows]
        assert [tuple(map(int, item)) for item in found] == expected
        assert spread.spare.tolist() == [18 - 7 - empty] * 3
        assert spread.empty.tolist() == [empty] * 3


def published_form():
    """Two layers in the form of TensorRT-LLM's maps of DeepSeek-V4: 416 slots, 4 ranks, 4 of 32 spare
    slots repeat an expert on their rank. In layer 4, one of these experts has a third replica elsewhere."""
    layers = {}
    for layer in LAYERS:
        rows = []
        for rank in range(RANKS):
            own = [(expert + 17 * layer) % EXPERTS for expert in range(96 * rank, 96 * rank + 96)]
            far = [(expert + 17 * layer) % EXPERTS for expert in range(96 * rank + 110, 96 * rank + 117)]
            rows.append([*own, own[rank], *far])
        if layer == LAYERS[1]:
            rows[1][-1] = rows[0][0]
        layers[layer] = [expert for row in rows for expert in row]
    return layers


def told(*arguments, code=0):
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    if code == 0:
        assert result.exit_code == 0, result.output + repr(result.exception)
        return result.output
    assert result.exit_code != 0
    raise result.exception


@pytest.fixture
def published(tmp_path):
    content = {
        "num_slots": SLOTS,
        "layer_updates_per_iter": 0,
        "initial_global_assignments": published_form(),
    }
    path = tmp_path / "moe_load_balancer.yaml"
    path.write_text(yaml.safe_dump(content, default_flow_style=None, sort_keys=False, width=2**20))
    return path


def test_a_map_in_the_form_that_tensorrt_llm_publishes(published):
    lines = told("--map", published, "--ranks", RANKS, "--json").splitlines()
    found = json.loads(lines[-1])
    assert (found["experts"], found["slots"], found["ranks"], found["nodes"]) == (EXPERTS, SLOTS, RANKS, 1)
    assert [item["layer"] for item in found["layers"]] == list(LAYERS)
    assert [item["spare_slots"] for item in found["layers"]] == [32, 32]
    assert [item["repeats_on_rank"] for item in found["layers"]] == [4, 4]
    # The expert with a third replica on another rank is no longer on one rank alone.
    assert [item["experts_on_one_rank"] for item in found["layers"]] == [4, 3]
    assert (found["repeats_on_rank"], found["experts_on_one_rank"]) == (8, 7)
    for item, row in zip(found["layers"], published_form().values(), strict=True):
        counts = Counter(row)
        assert item["replica_count"] == [counts[expert] for expert in range(EXPERTS)]
    text = " ".join(" ".join(lines[:-1]).split())
    assert "2 layers, 384 experts in 416 slots, 4 ranks on 1 node" in text
    assert "8 of 64 spare slots repeat an expert of their rank, which relieves no rank." in text
    counts = Counter(n for row in published_form().values() for n in Counter(row).values())
    shares = ", ".join(f"{counts[n]} with {n}" for n in sorted(counts))
    assert f"Replicas of an expert, over all layers: {shares}." in text
    rows = [line.split() for line in lines if line.split()[:1] in (["3"], ["4"], ["sum"])]
    assert [row[:4] for row in rows] == [
        ["3", "32", "4", "4"],
        ["4", "32", "4", "3"],
        ["sum", "64", "8", "7"],
    ]
    nodes = json.loads(told("--map", published, "--ranks", 4, "--nodes", 2, "--json").splitlines()[-1])
    slow = [
        slow_counts(row, Topology(num_ranks=4, num_slots=SLOTS, num_nodes=2))
        for row in published_form().values()
    ]
    assert [item["experts_on_one_node"] for item in nodes["layers"]] == [item[2] for item in slow]


def test_with_a_load_its_balance(published, tmp_path):
    generator = torch.Generator().manual_seed(0)
    load = torch.randint(0, 90, (5, 2, EXPERTS), generator=generator)
    # The layers of the load are those judged, by the numbers of the model.
    path = tmp_path / "load.npz"
    save_load_trace(path, LoadTrace(load, layer_ids=LAYERS))
    lines = told("--map", published, path, "--ranks", RANKS, "--json").splitlines()
    found = json.loads(lines[-1])
    topology = Topology(num_ranks=RANKS, num_slots=SLOTS)
    placement = Placement(torch.tensor(list(published_form().values())), EXPERTS)
    assert found["balancedness"] == balancedness(load, placement, topology)
    default = Placement.default(2, EXPERTS, SLOTS)
    assert found["default_balancedness"] == balancedness(load, default, topology)
    for layer in (0, 1):
        row = Placement(placement.physical_to_logical[layer : layer + 1], EXPERTS)
        score = balancedness(load[:, layer : layer + 1], row, topology)
        assert found["layers"][layer]["balancedness"] == score
        assert f"{score:.4f}" in "\n".join(lines)
    save_load_trace(path, LoadTrace(load[:, :1], layer_ids=(4,)))
    found = json.loads(told("--map", published, path, "--ranks", RANKS, "--json").splitlines()[-1])
    assert [item["layer"] for item in found["layers"]] == [4]
    save_load_trace(path, LoadTrace(load[:, :1], layer_ids=(5,)))
    with pytest.raises(TraceError, match=r"has no layer 5; it has 3 to 4"):
        told("--map", published, path, "--ranks", RANKS, code=2)
    save_load_trace(path, LoadTrace(load[:, :1, :300], layer_ids=(4,)))
    with pytest.raises(PlacementError, match=r"outside 0\.\.299"):
        told("--map", published, path, "--ranks", RANKS, code=2)


def test_every_format_gives_the_same_counts(tmp_path):
    generator = torch.Generator().manual_seed(3)
    rows = torch.stack([torch.randperm(12, generator=generator) % 7 for _ in range(3)])
    placement, topology = Placement(rows, 7), Topology(num_ranks=4, num_slots=12, num_nodes=2)
    for form, name in (("json", "a.json"), ("sglang", "b.json"), ("tensorrt-llm", "c.yaml")):
        write_placement(tmp_path / name, placement, (0, 1, 2), topology, form)
    np.savez(tmp_path / "d.npz", physical_to_logical=rows.numpy(), num_ranks=4, num_nodes=2)
    torch.save({"physical_to_logical_map": rows}, tmp_path / "e.pt")
    torch.save({"records": [], "last_physical_to_logical_map": rows.int()}, tmp_path / "f.pt")
    expected = [slow_counts(row, topology) for row in rows.tolist()]
    for name in ("a.json", "b.json", "c.yaml", "d.npz", "e.pt", "f.pt"):
        # The package's own files name ranks and nodes; the others need the options.
        options = [] if name in ("a.json", "d.npz") else ["--ranks", "4", "--nodes", "2"]
        found = json.loads(told("--map", tmp_path / name, *options, "--json").splitlines()[-1])
        keys = ("repeats_on_rank", "experts_on_one_rank", "experts_on_one_node", "replicated_experts")
        assert [tuple(item[key] for key in keys) for item in found["layers"]] == expected
        assert read_placement_file(tmp_path / name).placement == placement
        if options:
            with pytest.raises(ConfigError, match=f"{name}: does not say over how many ranks its 12 slots"):
                told("--map", tmp_path / name, code=2)
    # The command line goes over the file.
    found = json.loads(
        told("--map", tmp_path / "a.json", "--ranks", "2", "--nodes", "1", "--json").splitlines()[-1]
    )
    assert (found["ranks"], found["nodes"]) == (2, 1)
    with pytest.raises(
        TopologyError, match="num_slots=12 is not divisible by num_ranks=5; 10 or 15 would be"
    ):
        told("--map", tmp_path / "b.json", "--ranks", "5", code=2)


def test_ranks_that_differ_and_empty_slots(tmp_path):
    topology = Topology(num_ranks=3, num_slots=8, rank_slots=(4, 1, 3))
    placement = Placement(torch.tensor([[0, 1, 0, -1, 2, 1, 1, -1]]), 3)
    write_placement(tmp_path / "a.json", placement, (7,), topology, "json")
    np.savez(
        tmp_path / "b.npz",
        physical_to_logical=placement.physical_to_logical.numpy(),
        rank_slots=np.array([4, 1, 3]),
        layer_ids=np.array([7]),
        num_logical=3,
    )
    for name in ("a.json", "b.npz"):
        found = json.loads(told("--map", tmp_path / name, "--json").splitlines()[-1])
        (layer,) = found["layers"]
        assert layer == {
            "layer": 7,
            "spare_slots": 3,
            "repeats_on_rank": 2,
            "experts_on_one_rank": 1,
            "replicated_experts": 2,
            "empty_slots": 2,
            "replica_count": [2, 3, 1],
        }


def test_numbers_of_a_file_that_contradict_each_other_name_it(tmp_path):
    rows = np.array([[0, 1, 0, 1]])
    for arrays, message in (
        ({"num_ranks": 0}, "num_ranks=0 is below 1"),
        ({"num_ranks": -1}, "num_ranks=-1 is below 1"),
        ({"num_ranks": 2**40}, "num_ranks is above 1048576"),
        ({"rank_slots": np.array([1, 2])}, r"rank_slots=\(1, 2\) are 3 slots in all, num_slots=4"),
    ):
        np.savez(tmp_path / "a.npz", physical_to_logical=rows, **arrays)
        with pytest.raises(TopologyError, match=rf"a\.npz: {message}"):
            told("--map", tmp_path / "a.npz", code=2)


def test_a_folder_without_a_load_is_named(tmp_path):
    for output in ([], ["-o", tmp_path / "a.html"]):
        with pytest.raises(TraceError, match=f"{tmp_path}: a folder with neither recorded intervals"):
            told(tmp_path, *output, code=2)
    torch.save({}, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match="report needs a load and --output FILE"):
        told(tmp_path, code=2)


def test_what_is_of_no_use_is_refused(published, tmp_path):
    cases = {
        ("-o", "out.html"): "--output is of no use with --map",
        ("--png", "folder"): "--png is of no use with --map",
        ("--policy", "greedy"): "--policy is of no use with --map",
        ("--groups", "2"): "--groups is of no use with --map",
        ("--steps", "2"): "--steps is for a load, and none is given beside --map",
        ("--slots", "400"): "has 416 slots, not --slots 400",
        ("a", "b"): "--map takes one load, not 2",
    }
    for arguments, message in cases.items():
        with pytest.raises(ConfigError, match=message):
            told("--map", published, "--ranks", RANKS, *arguments, code=2)
    for arguments in ([], ["gpt-oss-20b"], ["-o", tmp_path / "a.html"]):
        with pytest.raises(ConfigError, match="report needs a load and --output FILE, or --map FILE"):
            told(*arguments, code=2)
    with pytest.raises(ConfigError, match="--json is for --map"):
        told("gpt-oss-20b", "-o", tmp_path / "a.html", "--json", code=2)


BAD_FILES = {
    "no array": ({"x": np.zeros(1)}, "array 'physical_to_logical' is missing"),
    "floats": ({"physical_to_logical": np.zeros((1, 2))}, r"physical_to_logical is float64 \(1, 2\)"),
    "one axis": ({"physical_to_logical": np.zeros(2, int)}, r"not integers \[layers, slots\]"),
    "layers": (
        {"physical_to_logical": np.array([[0, 1]]), "layer_ids": np.array([1, 2])},
        "2 layer_ids for 1",
    ),
    "twice": (
        {"physical_to_logical": np.array([[0, 1], [1, 0]]), "layer_ids": np.array([1, 1])},
        r"a\.npz: layer_ids repeated: \[1\]",
    ),
    "layer below 0": (
        {"physical_to_logical": np.array([[0, 1]]), "layer_ids": np.array([-2])},
        r"a\.npz: layer_ids below 0: \[-2\]",
    ),
    "experts": (
        {"physical_to_logical": np.array([[0, 1]]), "num_logical": 2**40},
        r"a\.npz: num_logical is above 1048576",
    ),
    "ranks": ({"physical_to_logical": np.array([[0, 1]]), "num_ranks": 0.5}, "num_ranks is float64"),
    "no expert": (
        {"physical_to_logical": np.array([[0, 2]])},
        "a.npz: layer 0 has no slot for expert 1 of 3",
    ),
    "only empty": ({"physical_to_logical": np.array([[-1, -1]])}, "num_logical=0"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_malformed_npz_maps_are_told(tmp_path, case):
    arrays, message = BAD_FILES[case]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises((TraceError, PlacementError), match=message):
        read_placement_file(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": 1}, "has none of the keys physical_to_logical_map, last_physical_to_logical_map; it has"),
        ([1], "it has 'list'"),
        ({"physical_to_logical_map": torch.ones(2)}, r"not integers \[layers, physical\]"),
        ({"physical_to_logical_map": 3}, "physical_to_logical_map is a int, not a tensor"),
    ],
)
def test_malformed_torch_maps_are_told(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(TraceError, match=message):
        read_placement_file(tmp_path / "a.pt")


def test_the_experts_of_the_file_and_of_the_load_agree(tmp_path):
    placement, topology = Placement(torch.tensor([[0, 1, 0, 1]]), 2), Topology(num_ranks=2, num_slots=4)
    write_placement(tmp_path / "a.json", placement, (0,), topology, "json")
    with pytest.raises(PlacementError, match=r"a\.json: is of 2 experts, not of 3"):
        read_placement_file(tmp_path / "a.json", 3)
