"""Every format of loads: what is written is read back equal."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from eplb_plugin.core.errors import TraceError
from eplb_plugin.formats.loads import LOAD_FORMATS, format_for_output, read_trace, recognise, write_load
from eplb_plugin.offline.traces import LoadTrace

from .samples import (
    LAYERS,
    NAMES,
    detail_dumps,
    trace_of,
    write,
)


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


def test_outputs_that_cannot_be(tmp_path):
    trace = trace_of()
    with pytest.raises(TraceError, match="names no format; there are npz"):
        format_for_output(tmp_path / "load.xyz", None)
    with pytest.raises(TraceError, match="no format 'xyz'"):
        format_for_output(tmp_path / "load.npz", "xyz")
    assert format_for_output(tmp_path / "load.dat", "csv").name == "csv"
    with pytest.raises(TraceError, match="give --top-k"):
        write_load(tmp_path / "s", trace, LOAD_FORMATS["tensorrt-llm"])
    with pytest.raises(TraceError, match="top_k=0 is below 1"):
        write_load(tmp_path / "s", trace, LOAD_FORMATS["tensorrt-llm"], 0)
    with pytest.raises(TraceError, match="no place for --top-k 2"):
        write_load(tmp_path / "a.csv", trace, LOAD_FORMATS["csv"], 2)
    write(tmp_path / "s", trace, "tensorrt-llm")
    with pytest.raises(TraceError, match="cannot be written"):
        write(tmp_path / "s", trace, "tensorrt-llm")
    for name in ("npz", "sglang", "csv", "benchmark-json"):
        with pytest.raises(TraceError, match="cannot be written"):
            write(tmp_path / "no folder" / "file", trace, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]
