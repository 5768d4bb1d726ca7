"""Every format: what is written is read back equal, and what is wrong with a file is told in one line."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from eplb_plugin.errors import EplbError, PlacementError, TraceError
from eplb_plugin.formats.loads import LOAD_FORMATS, format_for_output, recognise, write_load
from eplb_plugin.formats.placements import PLACEMENT_FORMATS, read_placement, write_placement
from eplb_plugin.placement import Placement
from eplb_plugin.topology import Topology
from eplb_plugin.traces import LoadTrace, read_trace

LAYERS = (3, 4, 6)
NAMES = {"npz": "load.npz", "sglang": "load.pt", "benchmark-json": "load.json", "csv": "load.csv"}
NAMES["tensorrt-llm"] = "statistics"


def trace_of(dtype=torch.int32, steps=4, layers=LAYERS, experts=5, seed=0):
    """A load with tokens in every step."""
    load = torch.randint(0, 50, (steps, len(layers), experts), generator=torch.Generator().manual_seed(seed))
    load[:, 0, 0] += 1
    load = load.to(dtype)
    return LoadTrace(load / 7 if dtype.is_floating_point else load, layer_ids=layers)


def write(path, trace, name):
    write_load(path, trace, LOAD_FORMATS[name], top_k=2 if name == "tensorrt-llm" else None)
    return path


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_loads_come_back_equal(tmp_path, name, dtype):
    trace = trace_of(dtype)
    path = write(tmp_path / NAMES[name], trace, name)
    assert recognise(path).name == name
    back = read_trace(path)
    rows = list(LAYERS) if name == "sglang" else slice(None)
    assert torch.equal(back.load[:, rows].double(), trace.load.double())
    assert back.load.is_floating_point() == dtype.is_floating_point
    kept = {"sglang": tuple(range(7)), "benchmark-json": (0, 1, 2)}
    assert back.layer_ids == kept.get(name, LAYERS)
    # Once read, it survives its own format without any change.
    second = read_trace(write(tmp_path / f"again {NAMES[name]}", back, name))
    assert torch.equal(second.load, back.load)
    assert (second.load.dtype, second.layer_ids) == (back.load.dtype, back.layer_ids)
    assert not list(tmp_path.glob("*.part"))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(NAMES)),
    counts=st.lists(st.integers(0, 2**53), min_size=6, max_size=6),
)
def test_large_counts_stay_exact(tmp_path_factory, name, counts):
    load = torch.tensor(counts, dtype=torch.int64).reshape(2, 1, 3)
    load[:, 0, 0] += (load.sum(2) == 0)[:, 0]
    path = tmp_path_factory.mktemp("exact") / NAMES[name]
    assert torch.equal(read_trace(write(path, LoadTrace(load), name)).load.long(), load)


def test_dense_layers_are_rows_of_zeros_for_sglang(tmp_path):
    trace = trace_of()
    write(tmp_path / "load.pt", trace, "sglang")
    count = torch.load(tmp_path / "load.pt", weights_only=True)["logical_count"]
    assert count.shape == (4, 7, 5)
    assert torch.equal(count[:, list(LAYERS)], trace.load)
    assert not count[:, [0, 1, 2, 5]].any()


def test_steps_that_sglang_did_not_fill_are_left_out(tmp_path):
    load = torch.zeros(10, 2, 3, dtype=torch.int32)
    load[2:5] = torch.arange(1, 19).reshape(3, 2, 3)
    torch.save({"rank": 0, "logical_count": load}, tmp_path / "dump.pt")
    assert torch.equal(read_trace(tmp_path / "dump.pt").load, load[2:5])
    torch.save({"logical_count": load[2].long()}, tmp_path / "one.pt")
    assert torch.equal(read_trace(tmp_path / "one.pt").load, load[2:3].long())


def detail_dumps(folder, placement, counts, mode, first_pass=7):
    """What the ranks write in the modes per_pass and per_token: counts [ranks, passes, layers, physical]."""
    folder.mkdir()
    for rank, of_rank in enumerate(counts):
        records = []
        for index, count in enumerate(of_rank):
            record = {"forward_pass_id": first_pass + index, "rank": rank, "gatherer_key": "primary"}
            if mode == "per_token":
                record |= {"input_ids": [1, 2], "positions": [0, 1], "forward_mode": 1, "misc_objects": []}
                record["topk_ids_of_layer"] = torch.full((2, 2, 8), -1, dtype=torch.int32)
            records.append(record | {"global_physical_count": count})
        content = {"records": records, "last_physical_to_logical_map": placement}
        torch.save(content, folder / f"expert_distribution_recorder_1.5_{rank}.pt")
    return folder


@pytest.mark.parametrize("mode", ["per_pass", "per_token"])
def test_the_ranks_of_a_detailed_recording_are_summed(tmp_path, mode):
    placement = torch.tensor([[0, 1, 2, 0], [2, 1, 0, 1]])
    counts = torch.randint(1, 9, (2, 3, 2, 4), dtype=torch.int32)
    folder = detail_dumps(tmp_path / "dumps", placement, counts, mode)
    back = read_trace(folder)
    expected = torch.zeros(3, 2, 3, dtype=torch.int64)
    for step in range(3):
        for layer in range(2):
            for slot in range(4):
                expected[step, layer, placement[layer, slot]] += counts[:, step, layer, slot].sum()
    assert torch.equal(back.load, expected)
    assert recognise(folder).name == "sglang"
    alone = read_trace(folder / "expert_distribution_recorder_1.5_1.pt").load
    assert torch.equal(alone.sum(2), counts[1].sum(2))


def test_the_ranks_of_tensorrt_llm_are_summed(tmp_path):
    folder = write(tmp_path / "statistics", trace_of(), "tensorrt-llm")
    other = trace_of(seed=1)
    counts = {
        f"{step}_{layer}": other.load[step, i].numpy() for step in range(4) for i, layer in enumerate(LAYERS)
    }
    save_file(counts, folder / "rank1.safetensors")
    # Choices of single tokens, of another shape, are no counts.
    save_file({"0_3": np.zeros((9, 2), np.int32)}, folder / "rank0_raw.safetensors")
    back = read_trace(folder)
    assert torch.equal(back.load, trace_of().load.long() + other.load)
    assert json.loads((folder / "meta_info.json").read_text()) == {
        "num_experts": 5,
        "num_experts_per_token": 2,
    }


def test_the_benchmark_may_have_other_keys(tmp_path):
    step = {"logical_expert_load": [[1, 2], [3, 4.5]], "physical_expert_load": [], "step": 3}
    path = tmp_path / "load.json"
    path.write_text(json.dumps({"topology": {}, "load_history": [step, step]}))
    assert read_trace(path).load.tolist() == [[[1, 2], [3, 4.5]]] * 2


def torch_file(content):
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def rezipped(content, change=lambda name, data: data, compression=zipfile.ZIP_STORED):
    """The same archive with its entries changed."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w", compression) as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)))
    return stream.getvalue()


def pickled(payload):
    """A file of torch.save whose pickle is `payload`."""
    return rezipped(torch_file({}), lambda name, data: payload if name.endswith("data.pkl") else data)


def bytearray_bomb():
    # bytearray(1 << 40): an allowed global of torch's own loader, and a terabyte.
    return b"\x80\x02c__builtin__\nbytearray\n\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"\x85R."


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def load_json(*steps):
    return json.dumps({"load_history": [{"logical_expert_load": step} for step in steps]}).encode()


GOOD_PT = torch_file({"logical_count": torch.ones(2, 3, 4, dtype=torch.int32)})
RECORD = {"forward_pass_id": 1, "rank": 0, "global_physical_count": torch.ones(1, 3, dtype=torch.int32)}
MAP = torch.tensor([[0, 1, 0]])


def records(*changed, placement=MAP):
    content = {"records": [RECORD | change for change in changed], "last_physical_to_logical_map": placement}
    return torch_file(content)


def negative(value=-1.0):
    count = torch.ones(2, 3, 4)
    count[1, 2, 3] = value
    return torch_file({"logical_count": count})


MALFORMED = {
    # SGLang
    "pt empty": ("a.pt", b"", "not a file of torch.save"),
    "pt text": ("a.pt", b"logical_count", "not a file of torch.save"),
    "pt truncated": ("a.pt", GOOD_PT[:-200], "not a file of torch.save"),
    "pt old pickle": ("a.pt", pickle.dumps({"logical_count": [1]}), "not a file of torch.save"),
    "pt pickled object": ("a.pt", torch_file({"logical_count": Trap()}), "holds the Python object _pytest"),
    "pt bytearray bomb": ("a.pt", pickled(bytearray_bomb()), "holds the Python object __builtin__.bytearray"),
    "pt newer pickle": ("a.pt", pickled(pickle.dumps(Path("x"), 4)), "its pickle is of protocol 4"),
    "pt stacked name": (
        "a.pt",
        pickled(b"\x80\x02\x8c\x02os\x8c\x06system\x93."),
        "that torch.save does not",
    ),
    "pt broken pickle": ("a.pt", pickled(b"\x80\x02}q"), "pickle is damaged"),
    "pt odd pickle": ("a.pt", pickled(b"\x80\x02."), "is damaged"),
    "pt compressed": ("a.pt", rezipped(GOOD_PT, compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "pt list": ("a.pt", torch_file([1, 2]), "holds a list, not a dict"),
    "pt other dict": ("a.pt", torch_file({"weight": MAP}), "neither logical_count nor records"),
    "pt text count": ("a.pt", torch_file({"logical_count": "many"}), "logical_count is a str"),
    "pt flat": ("a.pt", torch_file({"logical_count": torch.ones(5)}), r"has shape \(5,\)"),
    "pt bool": (
        "a.pt",
        torch_file({"logical_count": torch.ones(1, 1, 1) > 0}),
        "holds the Python object torch.BoolStorage",
    ),
    "pt negative": ("a.pt", negative(), "step 1, layer 2, expert 3 is -1"),
    "pt NaN": ("a.pt", negative(float("nan")), "step 1, layer 2, expert 3 is nan"),
    "pt idle": ("a.pt", torch_file({"logical_count": torch.zeros(5, 1, 2)}), "none of its 5 steps"),
    "pt stride bomb": (
        "a.pt",
        torch_file({"logical_count": torch.ones(1).expand(10**6, 10**3, 10**3)}),
        "more than it holds",
    ),
    "pt no records": ("a.pt", records(), "records is empty"),
    "pt record list": (
        "a.pt",
        torch_file({"records": [[1]], "last_physical_to_logical_map": MAP}),
        r"records\[0\] is a list",
    ),
    "pt text pass": ("a.pt", records({"forward_pass_id": "one"}), r"records\[0\]: forward_pass_id='one'"),
    "pt twice": ("a.pt", records({}, {}), r"records\[1\]: rank 0 recorded forward pass 1 in .* too"),
    "pt wrong slots": (
        "a.pt",
        records({"global_physical_count": torch.ones(1, 4, dtype=torch.int32)}),
        r"global_physical_count is torch.int32 \(1, 4\), not integers \(1, 3\)",
    ),
    "pt negative count": (
        "a.pt",
        records({"global_physical_count": torch.tensor([[1, -2, 0]])}),
        r"global_physical_count\[0, 1\]=-2",
    ),
    "pt wrong map": ("a.pt", records({}, placement=torch.tensor([[0, 1, 9]])), "names the expert 9"),
    "pt float map": (
        "a.pt",
        records({}, placement=MAP.float()),
        "last_physical_to_logical_map is torch.float",
    ),
    # The public benchmark
    "json truncated": ("a.json", load_json([[1, 2]])[:-4], "Invalid JSON: EOF"),
    "json empty": ("a.json", b"", "Invalid JSON"),
    "json deep": ("a.json", b"[" * 10**5, "recursion limit"),
    "json list": ("a.json", b"[1, 2]", "valid dictionary|object"),
    "json other": ("a.json", b'{"loads": []}', "load_history: Field required"),
    "json no steps": ("a.json", load_json(), "load_history is empty"),
    "json no load": (
        "a.json",
        b'{"load_history": [{}]}',
        "load_history.0.logical_expert_load: Field required",
    ),
    "json text": ("a.json", load_json([[1, "2"]]), "load_history.0.logical_expert_load.0.1: .*number"),
    "json bool": ("a.json", load_json([[1, True]]), "load_history.0.logical_expert_load.0.1: .*number"),
    "json null": ("a.json", load_json([[1, 2]], [[1, None]]), "load_history.1.logical_expert_load.0.1: "),
    "json ragged": (
        "a.json",
        load_json([[1, 2], [3]]),
        r"load_history.0.logical_expert_load.1 has 1 experts",
    ),
    "json short step": (
        "a.json",
        load_json([[1]] * 2, [[1]]),
        r"load_history.1.logical_expert_load has 1 lay",
    ),
    "json no experts": ("a.json", load_json([[]]), r"shape \(1, 1, 0\)"),
    "json flat": ("a.json", load_json([1, 2]), "load_history.0.logical_expert_load.0: .*(list|array)"),
    "json NaN": ("a.json", load_json([[1.0, float("nan")]]), "step 0, layer 0, expert 1 is nan"),
    "json negative": ("a.json", load_json([[1, 2]], [[1, -2]]), "step 1, layer 0, expert 1 is -2"),
    "json huge": ("a.json", load_json([[1, 10**30]]), "above 64 bits"),
    "json bytes": ("a.json", b"\xff\xfe\x00", "Invalid JSON"),
    # CSV
    "csv empty": ("a.csv", b"", "line 1 is not the header"),
    "csv header": ("a.csv", b"step,layer,a,b\n0,0,1,2\n", "line 1 is not the header"),
    "csv no experts": ("a.csv", b"step,layer\n0,0\n", "line 1 is not the header"),
    "csv no rows": ("a.csv", b"step,layer,expert_0\n", "has a header and no rows"),
    "csv short row": ("a.csv", b"step,layer,expert_0\n0,0,1\n1,0\n", "line 3 has 2 cells"),
    "csv text": ("a.csv", b"step,layer,expert_0\n0,0,many\n", "line 2, expert_0: 'many' is not a number"),
    "csv text step": ("a.csv", b"step,layer,expert_0\nx,0,1\n", "line 2, step: 'x' is not an integer"),
    "csv negative": ("a.csv", b"step,layer,expert_0\n0,0,-1\n", "step 0, layer 0, expert 0 is -1"),
    "csv NaN": ("a.csv", b"step,layer,expert_0\n0,0,nan\n", "step 0, layer 0, expert 0 is nan"),
    "csv unsorted": ("a.csv", b"step,layer,expert_0\n1,0,1\n0,0,1\n", "row 2 is of step 0, layer 0"),
    "csv layers": (
        "a.csv",
        b"step,layer,expert_0\n0,0,1\n0,1,1\n1,0,1\n1,2,1\n",
        "row 4 is of step 1, layer 2",
    ),
    "csv truncated": ("a.csv", b"step,layer,expert_0\n0,0,1\n0,1,1\n1,0,1\n", "after 1 of 2 layers"),
    "csv falling layers": ("a.csv", b"step,layer,expert_0\n0,1,1\n0,0,1\n", "do not rise"),
    "csv binary": ("a.csv", b"\xff\xfe\x00\x01", "not text in UTF-8"),
    "csv quotes": ("a.csv", b'step,layer,expert_0\n0,0,"' + b"1" * 200_000 + b'"\n', "line 2: field larger"),
    # npz: more of it in test_traces.py
    "npz truncated": ("a.npz", b"PK\x03\x04", "not a readable"),
    "unknown suffix": ("a.xlsx", b"1", "of no known format"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_told_in_one_line(tmp_path, case):
    name, content, message = MALFORMED[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TraceError, match=message) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_many_malformed_files_are_tried():
    assert len(MALFORMED) >= 50


META = b'{"num_experts": 2, "num_experts_per_token": 1}'
ONE = {"0_0": {"dtype": "I32", "shape": [2], "data_offsets": [0, 8]}}
STATISTICS = {
    "no rank": (META, None, "no rank\\*.safetensors"),
    "meta text": (b"two", b"", "meta_info.json: Invalid JSON"),
    "meta lacks": (b'{"num_experts": 2}', b"", "num_experts_per_token: Field required"),
    "meta negative": (b'{"num_experts": -2, "num_experts_per_token": 1}', b"", "num_experts: .*greater"),
    "empty": (META, b"", "not a readable safetensors file"),
    "truncated": (META, safetensors(ONE, b"1234"), "not a readable safetensors file"),
    "long header": (META, struct.pack("<Q", 2**60) + b"{}", "not a readable safetensors file"),
    "bad header": (META, safetensors(b"{nonsense"), "not a readable safetensors file"),
    "bad key": (META, safetensors({"weight": ONE["0_0"]}, bytes(8)), "'weight' is not called"),
    "bad shape": (
        META,
        safetensors({"0_0": {"dtype": "I32", "shape": [3], "data_offsets": [0, 12]}}, bytes(12)),
        r"'0_0' is int32 \(3,\), not numbers \[2\]",
    ),
    "bool": (
        META,
        safetensors({"0_0": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}, bytes(2)),
        "'0_0' is bool",
    ),
    "negative": (META, safetensors(ONE, struct.pack("<ii", 1, -1)), "negative or NaN"),
    "hole": (
        META,
        safetensors(
            {
                "0_0": ONE["0_0"],
                "0_1": {"dtype": "I32", "shape": [2], "data_offsets": [8, 16]},
                "1_1": {"dtype": "I32", "shape": [2], "data_offsets": [16, 24]},
            },
            bytes(24),
        ),
        "iteration 1 has no layer 0",
    ),
}


@pytest.mark.parametrize("case", STATISTICS)
def test_malformed_statistics_are_told(tmp_path, case):
    meta, rank, message = STATISTICS[case]
    (tmp_path / "meta_info.json").write_bytes(meta)
    if rank is not None:
        (tmp_path / "rank0.safetensors").write_bytes(rank)
    with pytest.raises(TraceError, match=message) as caught:
        read_trace(tmp_path)
    assert "\n" not in str(caught.value)


def test_sizes_are_bounded_before_anything_is_unpacked(tmp_path):
    trace = LoadTrace(torch.ones(4, 100, 100))
    for name, file in NAMES.items():
        path = write(tmp_path / file, trace, name)
        with pytest.raises(
            TraceError, match=r"1000 (bytes )?(allowed|are allowed|bytes allowed)|1000 allowed"
        ):
            read_trace(path, max_bytes=1000)


def test_folders_and_files_that_are_not_there(tmp_path):
    for path, message in [
        (tmp_path, "neither meta_info.json"),
        (tmp_path / "no.pt", "no such file"),
        (tmp_path / "no.json", "no such file"),
        (tmp_path / "no.csv", "no such file"),
        (tmp_path / "no.anything", "no such file"),
        (tmp_path / "meta_info.json", "read from the folder"),
    ]:
        with pytest.raises(TraceError, match=message):
            read_trace(path)


def test_dumps_that_do_not_belong_together(tmp_path):
    placement = torch.tensor([[0, 1, 2, 0]])
    folder = detail_dumps(
        tmp_path / "dumps", placement, torch.ones(1, 2, 1, 4, dtype=torch.int32), "per_pass"
    )
    (folder / "other.pt").write_bytes(records({"rank": 1}))
    with pytest.raises(TraceError, match="other ranks have 1 of 3"):
        read_trace(folder)
    (folder / "other.pt").write_bytes(GOOD_PT)
    with pytest.raises(TraceError, match="one by one"):
        read_trace(folder)


def test_outputs_that_cannot_be(tmp_path):
    trace = trace_of()
    with pytest.raises(TraceError, match="names no format; there are npz"):
        format_for_output(tmp_path / "load.xyz", None)
    with pytest.raises(TraceError, match="no format 'xyz'"):
        format_for_output(tmp_path / "load.npz", "xyz")
    assert format_for_output(tmp_path / "load.dat", "csv").name == "csv"
    with pytest.raises(TraceError, match="give top_k"):
        write_load(tmp_path / "s", trace, LOAD_FORMATS["tensorrt-llm"])
    with pytest.raises(TraceError, match="top_k=0 is below 1"):
        write_load(tmp_path / "s", trace, LOAD_FORMATS["tensorrt-llm"], 0)
    with pytest.raises(TraceError, match="no place for top_k=2"):
        write_load(tmp_path / "a.csv", trace, LOAD_FORMATS["csv"], 2)
    write(tmp_path / "s", trace, "tensorrt-llm")
    with pytest.raises(TraceError, match="cannot be written"):
        write(tmp_path / "s", trace, "tensorrt-llm")
    for name in ("npz", "sglang", "csv", "benchmark-json"):
        with pytest.raises(TraceError, match="cannot be written"):
            write(tmp_path / "no folder" / "file", trace, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


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
BAD_PLACEMENTS = {
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
    "huge id": ("a.json", json.dumps(OURS | {"physical_to_logical": [[0, 10**30]]}), "a.json"),
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
    (tmp_path / name).write_text(text)
    with pytest.raises(EplbError, match=message) as caught:
        read_placement(tmp_path / name, 2, (0,))
    assert "\n" not in str(caught.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10_000), flip=st.integers(1, 255))
def test_a_flipped_byte_in_a_dump_is_harmless_or_told(tmp_path, position, flip):
    content = bytearray(records({}, {"forward_pass_id": 2}))
    content[position % len(content)] ^= flip
    path = tmp_path / "flip.pt"
    path.write_bytes(content)
    try:
        read_trace(path)
    except TraceError as error:
        assert "\n" not in str(error)  # noqa: PT017
