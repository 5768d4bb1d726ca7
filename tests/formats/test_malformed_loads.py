"""What is wrong with a file is told in one line."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eplb_plugin.core.errors import TraceError
from eplb_plugin.formats.loads import read_trace

from .samples import (
    GOOD_PT,
    MAP,
    pickled,
    records,
    rezipped,
    torch_file,
)


def bytearray_bomb():
    # bytearray(1 << 40): an allowed global of torch's own loader, and a terabyte.
    return b"\x80\x02c__builtin__\nbytearray\n\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"\x85R."


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def load_json(*steps):
    return json.dumps({"load_history": [{"logical_expert_load": step} for step in steps]}).encode()


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
