"""Files made to deceive: each took gigabytes, ended the process or passed for another, or might."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from safetensors.numpy import save as safetensors

from eplb_plugin.config.sources import load_settings
from eplb_plugin.core.errors import ConfigError, TraceError
from eplb_plugin.core.placement import Placement
from eplb_plugin.core.topology import Topology
from eplb_plugin.formats.loads import LOAD_FORMATS, read_trace, write_load
from eplb_plugin.formats.placements import read_placement, write_placement
from eplb_plugin.offline.token_replay import fold_decode, fold_prefill
from eplb_plugin.offline.traces import LoadTrace

from .parsers import is_told


def refused(folder, name, content, message):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(TraceError, match=message) as caught:
        read_trace(path.parent if name.startswith("statistics") else path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


META = b'{"num_experts": 4, "num_experts_per_token": 2}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (safetensors({}), "no arrays in its"),
        (safetensors({"9" * 5000 + "_0": np.ones(4, np.int32)}), "is not called iteration_layer"),
        (safetensors({"0_99999999999999999999": np.ones(4, np.int32)}), "layer_ids go up to 9999"),
        (safetensors({"0_0": np.full(4, 2**64 - 1, np.uint64)}), "value 18446744073709551615, above"),
    ],
)
def test_statistics_that_claim_too_much(tmp_path, content, message):
    (tmp_path / "statistics").mkdir()
    (tmp_path / "statistics" / "meta_info.json").write_bytes(META)
    refused(tmp_path, "statistics/rank0.safetensors", content, message)


def test_a_long_cell_does_not_widen_all_of_its_row(tmp_path):
    """Text arrays are as wide as their longest cell: 4 GB for this file of 200 KB."""
    header = "step,layer," + ",".join(f"expert_{index}" for index in range(8000))
    content = f"{header}\n0,0,{'1,' * 7999}{'0' * 130_000}\n".encode()
    refused(tmp_path, "a.csv", content, "line 2, expert_7999: '0000")


def tokens(num_experts, **changes):
    arrays = {
        "topk_ids": np.zeros((5, 1, 2), np.uint8),
        "request": np.zeros(5, np.int64),
        "category": np.array(["a"]),
        "num_experts": np.array(num_experts),
    }
    stream = io.BytesIO()
    np.savez(stream, **{**arrays, **changes})
    return stream.getvalue()


@pytest.mark.parametrize("num_experts", [10**12, 2**63 - 1, np.uint64(2**64 - 1)])
def test_tokens_of_a_trillion_experts(tmp_path, num_experts):
    refused(tmp_path, "a.npz", tokens(num_experts), r"num_experts=\d+ is outside 1..65536")


def test_tokens_that_unfold_to_too_much(tmp_path):
    (tmp_path / "a.npz").write_bytes(tokens(65536))
    trace = read_trace(tmp_path / "a.npz")
    for fold in (
        lambda: fold_decode(trace, 1, steps=10**9),
        lambda: fold_decode(trace, 10**12, steps=2),
        lambda: fold_decode(trace, 2, steps=40_000),
    ):
        with pytest.raises(TraceError, match="too much memory"):
            fold()
    assert fold_prefill(trace, 10**30).load.sum() == 10


def test_unsigned_tokens_are_counted(tmp_path):
    ids = np.zeros((5, 1, 2), np.uint64)
    (tmp_path / "a.npz").write_bytes(tokens(np.uint64(3), topk_ids=ids, request=np.zeros(5, np.uint64)))
    assert fold_decode(read_trace(tmp_path / "a.npz"), 2, steps=3).load.sum() == 12


def test_layers_that_no_model_has(tmp_path):
    with pytest.raises(TraceError, match="layer_ids go up to 1000000000000, not below 65536"):
        LoadTrace(torch.ones(1, 1, 1), layer_ids=(10**12,))
    # Of formats with a row for every layer, the first 65535 are empty.
    trace = LoadTrace(torch.ones(100, 1, 100), layer_ids=(65535,))
    with pytest.raises(TraceError, match="layers up to 65535 would take 2621440000 bytes"):
        write_load(tmp_path / "a.pt", trace, LOAD_FORMATS["sglang"])
    topology = Topology(num_ranks=1, num_slots=2048)
    with pytest.raises(TraceError, match="layers up to 65535 would take 134217728 slots"):
        write_placement(tmp_path / "a.json", Placement.default(1, 1, 2048), (65535,), topology, "sglang")
    assert list(tmp_path.iterdir()) == []


def dump(content):
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


@pytest.mark.parametrize("slots", [1, 3, 4, 5])
def test_counts_that_wrap_around_when_added(tmp_path, slots):
    """Four of them add up to 0 in 64 bits, five to something that looks well."""
    record = {"forward_pass_id": 1, "rank": 0, "global_physical_count": torch.full((1, slots), 2**62)}
    placement = torch.zeros(1, slots, dtype=torch.int64)
    content = dump({"records": [record], "last_physical_to_logical_map": placement})
    refused(tmp_path, "a.pt", content, r"records\[0\]: an expert got .* tokens, above 9007199254740992")


def test_a_dump_of_many_long_names(tmp_path):
    refused(tmp_path, "a.pt", dump({"k" * 10_000 + str(i): 1 for i in range(50)}), "neither logical_count")


def test_a_tensor_that_is_negated_by_a_flag(tmp_path):
    count = torch.full((1, 2, 3), -1j).conj().imag
    assert count.is_neg()
    (tmp_path / "a.pt").write_bytes(dump({"logical_count": count}))
    assert torch.equal(read_trace(tmp_path / "a.pt").load, torch.ones(1, 2, 3))


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("depth", [0, 1])
def test_no_pickle_runs(tmp_path, protocol, depth):
    canary = tmp_path / "canary"
    payload = pickle.dumps({"logical_count": Trap(str(canary)), "records": [Trap(str(canary))]}, protocol)
    if depth:
        payload = pickle.dumps({"records": [payload]}, protocol)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3\n")
    refused(tmp_path, "a.pt", stream.getvalue(), "a.pt")
    refused(tmp_path, "a.npz", stream.getvalue(), "a.npz")
    refused(tmp_path, "b.pt", payload, "b.pt")
    assert not canary.exists()


def test_an_archive_that_promises_terabytes(tmp_path):
    header = b"{'descr': '<i4', 'fortran_order': False, 'shape': (1000000, 1000, 1000), }"
    npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("load.npy", npy)
    refused(tmp_path, "a.npz", stream.getvalue(), "declares shape .* but holds 0 bytes")


LAUGHS = "[&a [x, x, x, x, x, x, x, x, x]" + "".join(
    f", &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]" for i in range(9)
)
BOMBS = {
    # The compiled parser recurses on the stack of the process, and ended it.
    "deep": ("[" * 100_000, "nested deeper than 32|exceeded maximum nesting depth"),
    "deep maps": ("{a: " * 20_000, "nested deeper than 32|exceeded maximum nesting depth"),
    "laughs": (f"planner: {{seed: {LAUGHS}]}}\nnum_slots: 2", "holds more than the .* values allowed"),
    "recursive": ("planner: &a {seed: *a}", "holds more than the .* values allowed"),
    "long integer": ("planner: {seed: " + "9" * 5000 + "}", "not YAML: .*4300 digits"),
    "hexadecimal": ("planner: {seed: 0x" + "f" * 5000 + "}", "holds an integer of 20000 bits"),
    "no date": ("planner: {seed: 2001-99-99}", "not YAML: month must be in"),
    "no time": ("planner: {seed: !!timestamp x}", "not YAML"),
    "no bool": ("planner: {seed: !!bool x}", "not YAML"),
    "no float": ("planner: {seed: !!float x}", "not YAML"),
    "object": ("planner: !!python/object/apply:os.getcwd []", "not YAML"),
    "not UTF-8": (b"planner: {seed: \xff}", "not YAML"),
    "too long": ("#" * 17 * 2**20, "is larger than the"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_yaml_that_the_safe_loader_lets_through(tmp_path, bomb):
    text, message = BOMBS[bomb]
    path = tmp_path / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for read, error in (
        (load_settings, ConfigError),
        (lambda path: read_placement(path, 2, (0, 1)), TraceError),
    ):
        with pytest.raises(error, match=message) as caught:
            read(path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000, "", ".", "/dev/null", "\udcff"])
@pytest.mark.parametrize("suffix", ["", ".npz", ".csv", ".pt", ".json", ".yaml"])
def test_names_that_are_no_files(name, suffix):
    for read in (read_trace, lambda path: read_placement(path, 2, (0, 1))):
        assert is_told(lambda: read(name + suffix))  # noqa: B023
    if name + suffix not in ("", "/dev/null"):
        assert is_told(lambda: load_settings(name + suffix))
