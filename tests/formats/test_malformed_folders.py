"""Folders with a file per rank, sizes, and files that are not there."""

from __future__ import annotations

import json
import struct

import pytest
import torch

from eplb_plugin.core.errors import TraceError
from eplb_plugin.formats.loads import read_trace
from eplb_plugin.offline.traces import LoadTrace

from .samples import (
    GOOD_PT,
    NAMES,
    detail_dumps,
    records,
    write,
)


def safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


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
        (tmp_path, "nor meta_info.json"),
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
