"""Reading, writing and folding traces, and every way in which a file can be wrong."""

from __future__ import annotations

import contextlib
import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_plugin.core.errors import TraceError
from eplb_plugin.formats.loads import read_trace
from eplb_plugin.formats.npz import save_load_trace
from eplb_plugin.offline.token_replay import category_mix, decode_schedule, fold_decode, fold_prefill
from eplb_plugin.offline.traces import LoadTrace, TokenTrace

REAL = Path(__file__).resolve().parents[2] / "shared" / "traces"
LOAD = np.arange(24, dtype=np.int32).reshape(2, 3, 4)


def tokens_of(lengths, *, layers=2, top_k=2, experts=8, categories=None, seed=0):
    """A token trace of requests with those lengths."""
    rng = np.random.default_rng(seed)
    request = np.repeat(np.arange(len(lengths)), lengths)
    ids = rng.random((len(request), layers, experts)).argsort(2)[:, :, :top_k].astype(np.uint8)
    if categories is None:
        categories = [f"kind {index % 2}" for index in range(len(lengths))]
    return TokenTrace(ids, request, np.array(categories), experts)


def save(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


def token_arrays(**changes):
    trace = tokens_of([3, 2])
    arrays = {
        "topk_ids": trace.topk_ids,
        "request": trace.request,
        "category": trace.category,
        "num_experts": np.int64(8),
    }
    arrays.update(changes)
    return {name: value for name, value in arrays.items() if value is not None}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
def test_a_load_survives_the_file(tmp_path, dtype):
    trace = LoadTrace(torch.arange(24).reshape(2, 3, 4).to(dtype) * 1000)
    save_load_trace(tmp_path / "load.npz", trace)
    back = read_trace(tmp_path / "load.npz")
    assert isinstance(back, LoadTrace)
    assert back.load.dtype == dtype
    assert torch.equal(back.load, trace.load)
    assert (back.num_steps, back.num_layers, back.num_experts) == (2, 3, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["load.npz"]


@pytest.mark.parametrize("dtype", ["<i2", ">i4", "<u8", "<f2", ">f8", "|u1"])
def test_loads_of_other_dtypes_keep_their_values(tmp_path, dtype):
    path = save(tmp_path / "load.npz", load=LOAD.astype(dtype))
    assert torch.equal(read_trace(path).load.double(), torch.from_numpy(LOAD).double())


def test_layers_of_the_model_are_kept(tmp_path):
    save_load_trace(tmp_path / "load.npz", LoadTrace(torch.ones(1, 3, 4), layer_ids=(3, 4, 6)))
    assert read_trace(tmp_path / "load.npz").layer_ids == (3, 4, 6)
    assert read_trace(save(tmp_path / "plain.npz", load=LOAD)).layer_ids == (0, 1, 2)
    for wrong, message in [
        ([0, 1], "2 layer_ids for 3 layers"),
        ([0, 2, 1], "do not rise"),
        ([-1, 2, 3], "do not rise from 0"),
        ([[0, 1, 2]], r"layer_ids is int64 \(1, 3\)"),
        ([0.0, 1, 2], "layer_ids is float64"),
    ]:
        with pytest.raises(TraceError, match=message):
            read_trace(save(tmp_path / "wrong.npz", load=LOAD, layer_ids=np.array(wrong)))


def test_fortran_order_is_undone(tmp_path):
    path = save(tmp_path / "load.npz", load=np.asfortranarray(LOAD))
    assert torch.equal(read_trace(path).load, torch.from_numpy(LOAD))


def test_a_token_trace_is_read(tmp_path):
    path = save(tmp_path / "tokens.npz", **token_arrays(dataset=np.array(["a", "b"])))
    trace = read_trace(path)
    assert isinstance(trace, TokenTrace)
    assert (trace.num_tokens, trace.num_layers, trace.top_k, trace.num_experts) == (5, 2, 2, 8)
    assert trace.first.tolist() == [0, 3, 5]
    assert trace.lengths.tolist() == [3, 2]


def test_a_trace_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(TraceError, match="cannot be written"):
        save_load_trace(tmp_path / "taken", LoadTrace(torch.ones(1, 1, 1)))
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def bad_value(value):
    load = LOAD.astype(np.float64)
    load[1, 2, 3] = value
    return {"load": load}


MALFORMED = {
    "no load": ({"weights": LOAD}, "expected either"),
    "both kinds": ({**token_arrays(), "load": LOAD}, "expected either"),
    "two axes": ({"load": LOAD[0]}, r"shape \(3, 4\)"),
    "no steps": ({"load": LOAD[:0]}, r"shape \(0, 3, 4\)"),
    "bool": ({"load": LOAD > 1}, "dtype bool"),
    "text": ({"load": LOAD.astype(str)}, "dtype <U"),
    "complex": ({"load": LOAD.astype(complex)}, "dtype complex128"),
    "NaN": (bad_value(np.nan), "step 1, layer 2, expert 3 is nan"),
    "infinite": (bad_value(np.inf), "step 1, layer 2, expert 3 is inf"),
    "negative float": (bad_value(-0.5), "step 1, layer 2, expert 3 is -0.5"),
    "negative": ({"load": LOAD - 1}, "step 0, layer 0, expert 0 is -1"),
    "inexact": ({"load": LOAD.astype(np.int64) + 2**60}, "above"),
    "beyond int64": ({"load": LOAD.astype(np.uint64) + np.uint64(2**63)}, "above"),
    "structured": ({"load": np.zeros((1, 1, 1), [("a", "i4")])}, "only plain numbers"),
    "float ids": (token_arrays(topk_ids=np.ones((5, 2, 2))), "topk_ids is float64"),
    "flat ids": (token_arrays(topk_ids=np.ones((5, 2), np.uint8)), r"topk_ids is uint8 \(5, 2\)"),
    "no tokens": (token_arrays(topk_ids=np.ones((0, 2, 2), np.uint8)), r"topk_ids is uint8 \(0, 2, 2\)"),
    "id too high": (token_arrays(num_experts=np.int64(7)), r"topk_ids\[\d, \d, \d\]=7 is outside 0..6"),
    "id negative": (token_arrays(topk_ids=np.full((5, 2, 2), -1)), r"topk_ids\[0, 0, 0\]=-1"),
    "short request": (token_arrays(request=np.zeros(4, int)), r"request is int64 \(4,\)"),
    "float request": (token_arrays(request=np.zeros(5)), "request is float64"),
    "unsorted": (token_arrays(request=np.array([0, 1, 1, 0, 1])), "token 3 belongs to request 0"),
    "unknown request": (token_arrays(request=np.array([0, 0, 0, 1, 2])), r"request\[4\]=2 is outside 0..1"),
    "no category": (token_arrays(category=None), "'category' is missing"),
    "square category": (token_arrays(category=np.zeros((2, 2), int)), r"category is int64 \(2, 2\)"),
    "float category": (token_arrays(category=np.zeros(2)), "category is float64"),
    "no experts": (token_arrays(num_experts=None), "'num_experts' is missing"),
    "many experts": (token_arrays(num_experts=np.array([8, 8])), r"num_experts is int64 \(2,\)"),
    "zero experts": (token_arrays(num_experts=np.int64(0)), "num_experts=0 is outside 1..65536"),
    "text experts": (token_arrays(num_experts=np.array("8")), "num_experts is <U1"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_arrays_are_named(tmp_path, name):
    arrays, message = MALFORMED[name]
    path = save(tmp_path / "trace.npz", **arrays)
    with pytest.raises(TraceError, match=message) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)


def test_pickled_objects_are_refused_unopened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    path = tmp_path / "trace.npz"
    np.savez(path, load=np.array([Trap()], dtype=object))
    with pytest.raises(TraceError, match="only plain numbers and text"):
        read_trace(path)


def test_files_that_are_no_archives(tmp_path):
    path = tmp_path / "trace.npz"
    with pytest.raises(TraceError, match="no such file"):
        read_trace(path)
    with pytest.raises(TraceError, match="a folder with neither"):
        read_trace(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(TraceError, match="not a readable"):
        read_trace(path)
    np.save(tmp_path / "plain.npy", LOAD)
    with pytest.raises(TraceError, match="of no known format"):
        read_trace(tmp_path / "plain.npy")


def zipped(path, content, name="load.npy"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return path


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_arrays_that_are_not_what_their_header_says(tmp_path):
    content = npy(LOAD)
    for changed, message in [
        (content[:-1], "holds 95 bytes"),
        (content + b"x", "holds 97 bytes"),
        (b"", "damaged"),
        (b"not an array at all", "damaged"),
        (content.replace(b"NUMPY\x01", b"NUMPY\x09"), "damaged|npy format"),
        (content.replace(b"(2, 3, 4)", b"(2, 3, -4"), "damaged"),
        (content.replace(b"(2, 3, 4)", b"(9, 9, 9)"), "holds 96 bytes"),
        (content.replace(b"<i4", b"<q9"), "damaged"),
    ]:
        with pytest.raises(TraceError, match=message):
            read_trace(zipped(tmp_path / "trace.npz", changed))


def test_a_header_cannot_make_numpy_allocate(tmp_path):
    header = "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000, 1000), }"
    text = header.ljust(117) + "\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + b"12345678"
    with pytest.raises(TraceError, match="declares shape"):
        read_trace(zipped(tmp_path / "trace.npz", content))


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    path = save(tmp_path / "bomb.npz", load=np.zeros((1, 1000, 1000)))
    assert path.stat().st_size < 20_000
    with pytest.raises(TraceError, match=r"declares 8000128 bytes, 4000000 of the 4000000 allowed"):
        read_trace(path, max_bytes=4_000_000)
    # Arrays that are small enough one by one count together.
    path = save(tmp_path / "tokens.npz", **token_arrays())
    with pytest.raises(TraceError, match="allowed for the file are left"):
        read_trace(path, max_bytes=400)


def test_a_bomb_that_declares_less_than_it_holds(tmp_path):
    path = zipped(tmp_path / "trace.npz", npy(np.zeros((1, 1000, 1000))))
    data = bytearray(path.read_bytes())
    true_size, told = struct.pack("<I", 8_000_128), struct.pack("<I", 136)
    assert data.count(true_size) == 2
    path.write_bytes(data.replace(true_size, told))
    with pytest.raises(TraceError, match="damaged"):
        read_trace(path)


def test_every_truncation_is_told(tmp_path):
    whole = save(tmp_path / "whole.npz", **token_arrays()).read_bytes()
    part = tmp_path / "part.npz"
    for size in range(0, len(whole), 37):
        part.write_bytes(whole[:size])
        with pytest.raises(TraceError):
            read_trace(part)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_flipped_byte_is_harmless_or_told(tmp_path_factory, position, flip):
    folder = tmp_path_factory.getbasetemp()
    whole = bytearray(save(folder / "flip.npz", **token_arrays()).read_bytes())
    whole[position % len(whole)] ^= flip
    (folder / "flip.npz").write_bytes(whole)
    with contextlib.suppress(TraceError):
        read_trace(folder / "flip.npz")


def count_slowly(trace, steps):
    """The load of lists of tokens, one token at a time."""
    load = torch.zeros(len(steps), trace.num_layers, trace.num_experts, dtype=torch.int32)
    for step, tokens in enumerate(steps):
        for token in tokens:
            for layer in range(trace.num_layers):
                for expert in trace.topk_ids[token, layer]:
                    load[step, layer, int(expert)] += 1
    return load


lengths = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


@settings(max_examples=50, deadline=None)
@given(lengths, st.integers(1, 5), st.integers(1, 30), st.integers(0, 9))
def test_decoding_follows_every_request_to_its_end(sizes, batch, steps, seed):
    trace = tokens_of(sizes)
    schedule = decode_schedule(trace, batch, steps, drift=1.5, period=20, seed=seed)
    assert schedule.shape == (steps, batch)
    ends = set((trace.first[1:] - 1).tolist())
    starts = set(trace.first[:-1].tolist())
    for before, after in zip(schedule[:-1].reshape(-1), schedule[1:].reshape(-1), strict=True):
        assert int(after) in starts if int(before) in ends else after == before + 1
    folded = fold_decode(trace, batch, steps=steps, drift=1.5, period=20, seed=seed)
    assert torch.equal(folded.load, count_slowly(trace, schedule))


@settings(max_examples=50, deadline=None)
@given(lengths, st.integers(1, 20))
def test_prefill_packs_whole_requests_in_file_order(sizes, max_tokens):
    trace = tokens_of(sizes)
    steps, room = [], 0
    for request, size in enumerate(sizes):
        if not size:
            continue
        if not steps or size > room:
            steps.append([])
            room = max_tokens
        steps[-1] += range(trace.first[request], trace.first[request + 1])
        room -= size
    assert torch.equal(fold_prefill(trace, max_tokens).load, count_slowly(trace, steps))


def test_folding_in_pieces_changes_nothing(monkeypatch):
    trace = tokens_of([5, 1, 7, 3])
    whole = fold_decode(trace, 4, steps=50, seed=3)
    monkeypatch.setattr("eplb_plugin.offline.token_replay._CHUNK_IDS", 40)
    assert torch.equal(fold_decode(trace, 4, steps=50, seed=3).load, whole.load)


def test_decoding_is_seeded_and_drifts():
    trace = tokens_of([4] * 40, categories=["a", "b", "c", "d"] * 10)
    one, same, other = (decode_schedule(trace, 64, 400, drift=2, period=100, seed=seed) for seed in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).any()
    mix = category_mix(trace, one).reshape(10, 40, 4).mean(1)
    assert mix.std(0).min() > 0.08
    steady = category_mix(trace, decode_schedule(trace, 64, 400, drift=0, period=100, seed=1))
    assert steady.reshape(10, 40, 4).mean(1).std(0).max() < 0.03


def test_the_mix_in_file_order():
    trace = tokens_of([10, 20, 10], categories=["b", "a", "b"])
    np.testing.assert_allclose(category_mix(trace, steps=4), [[0, 1], [1, 0], [1, 0], [0, 1]])
    np.testing.assert_allclose(category_mix(trace), [[0.5, 0.5]])
    with pytest.raises(TraceError, match="40 tokens, fewer than steps=41"):
        category_mix(trace, steps=41)


def test_numbers_below_one_are_refused():
    trace = tokens_of([3])
    with pytest.raises(TraceError, match="batch=0"):
        fold_decode(trace, 0)
    with pytest.raises(TraceError, match="steps=0"):
        fold_decode(trace, 1, steps=0)
    with pytest.raises(TraceError, match="max_tokens=0"):
        fold_prefill(trace, 0)


@pytest.mark.skipif(not REAL.is_dir(), reason="no recorded traces beside the repository")
def test_real_traces_fold_completely():
    trace = read_trace(REAL / "gpt_oss_20b_decode_tokens.npz")
    assert (trace.num_tokens, trace.num_layers, trace.top_k, trace.num_experts) == (141_359, 24, 4, 32)
    folded = fold_decode(trace, 256)
    assert folded.load.shape == (552, 24, 32)
    assert (folded.load.sum(2) == 256 * 4).all()
    trace = read_trace(REAL / "deepseek_v2_lite_prefill_tokens.npz")
    folded = fold_prefill(trace, 1024)
    assert int(folded.load.sum()) == trace.topk_ids.size
    assert int(folded.load.sum(2).max()) <= 1024 * 6
