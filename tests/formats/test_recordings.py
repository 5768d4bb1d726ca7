"""Recordings: what is written is read, whatever was killed, cut off or mixed in between."""

from __future__ import annotations

import multiprocessing
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from eplb_plugin.config.options import RebalancerOptions
from eplb_plugin.core.errors import TraceError
from eplb_plugin.core.placement import Placement
from eplb_plugin.core.topology import Topology
from eplb_plugin.formats.loads import read_trace
from eplb_plugin.formats.placements import read_placement_file
from eplb_plugin.formats.recordings import (
    RecordedInterval,
    is_recording,
    next_name,
    read_interval,
    read_recording,
    recorded_files,
    remove_oldest,
    write_interval,
)
from eplb_plugin.runtime.rebalancer import Rebalancer

LAYERS, EXPERTS = 2, 8


def interval(seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    topology = Topology(num_nodes=2, num_ranks=4, num_slots=12, num_groups=2)
    return replace(
        RecordedInterval(
            snapshots=torch.randint(100, (4, LAYERS, EXPERTS), generator=generator),
            samples=torch.randint(9, (3, LAYERS, EXPERTS), generator=generator),
            placement=Placement.default(LAYERS, EXPERTS, 12),
            topology=topology,
            layer_ids=(3, 5),
            expert_bytes=1e6,
            step_seconds=0.025,
            steps=100,
            copies=2,
            engine="vLLM",
            model="tiny",
        ),
        **changes,
    )


def write_all(folder, *intervals):
    for number, one in enumerate(intervals, 1):
        write_interval(folder / next_name(1e9, number), one)


def test_a_file_says_what_was_written(tmp_path):
    one = interval()
    write_all(tmp_path, one)
    (file,) = recorded_files(tmp_path)
    read = read_interval(file)
    assert torch.equal(read.snapshots, one.snapshots)
    assert torch.equal(read.samples, one.samples)
    for name in (
        "placement",
        "topology",
        "layer_ids",
        "expert_bytes",
        "step_seconds",
        "steps",
        "copies",
        "engine",
        "model",
    ):
        assert getattr(read, name) == getattr(one, name), name
    # Other readers take it for a load, and for a map.
    assert torch.equal(read_trace(file).load.long(), one.snapshots)
    content = read_placement_file(file)
    assert content.placement == one.placement
    assert (content.layer_ids, content.num_ranks, content.num_nodes) == ((3, 5), 4, 2)


def test_counts_beyond_32_bits_and_ranks_that_differ_in_slots(tmp_path):
    topology = Topology(num_ranks=3, num_slots=12, rank_slots=(5, 5, 2))
    large = torch.full((1, LAYERS, EXPERTS), 2**40)
    write_all(tmp_path, interval(snapshots=large, topology=topology))
    read = read_recording(tmp_path)
    assert torch.equal(read.trace.load, large)
    assert read.newest.topology == topology


def test_a_folder_is_one_load_in_time_order(tmp_path):
    ones = [interval(seed, step_seconds=seconds) for seed, seconds in enumerate((0.01, 0.03, 0.02))]
    ones[2] = replace(
        ones[2],
        placement=Placement.default(LAYERS, EXPERTS, 16),
        topology=Topology(num_ranks=2, num_slots=16),
    )
    write_all(tmp_path, *ones)
    read = read_recording(tmp_path)
    assert torch.equal(read.trace.load, torch.cat([one.snapshots for one in ones]))
    assert torch.equal(read.trace.samples, torch.cat([one.samples for one in ones]))
    assert read.trace.sample_steps == (0, 1, 2, 4, 5, 6, 8, 9, 10)
    assert read.trace.layer_ids == (3, 5)
    assert read.trace.engine_steps == 25
    assert read.step_seconds == 0.02
    assert read.newest.topology.num_ranks == 2, "the map in force is that of the end"
    assert read.left_out == ()
    assert torch.equal(read_trace(tmp_path).load, read.trace.load)


def test_parts_of_a_load_keep_their_samples(tmp_path):
    write_all(tmp_path, interval(0), interval(1))
    trace = read_recording(tmp_path).trace
    part = trace.part(2, 6)
    assert torch.equal(part.load, trace.load[2:6])
    assert part.sample_steps == (0, 2, 3)
    assert torch.equal(part.samples, trace.samples[2:5])
    assert torch.equal(part.single_steps, part.samples)
    assert trace.part(3, 4).single_steps.shape == (0, LAYERS, EXPERTS)


def test_older_files_of_another_model_are_left_out(tmp_path):
    write_all(tmp_path, interval(0, model="other"), interval(1), interval(2))
    read = read_recording(tmp_path)
    assert read.trace.num_steps == 8
    first = recorded_files(tmp_path)[0]
    assert read.left_out == (f"1 older file is of another model, and left out: {first.name}",)
    write_all(tmp_path, *(interval(seed, model="other") for seed in range(5)), interval(5))
    names = [file.name for file in recorded_files(tmp_path)]
    (said,) = read_recording(tmp_path).left_out
    shown = ", ".join(names[4:1:-1])
    assert said == f"5 older files are of another model, and left out: {shown} and 2 more"


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_truncated_files_are_left_out(tmp_path, keep):
    write_all(tmp_path, interval(0), interval(1), interval(2))
    cut = recorded_files(tmp_path)[1]
    cut.write_bytes(cut.read_bytes()[:keep])
    read = read_recording(tmp_path)
    assert torch.equal(read.trace.load, torch.cat([interval(0).snapshots, interval(2).snapshots]))
    (said,) = read.left_out
    assert said.startswith(f"1 file cannot be read, and is left out: {cut.name} (")
    assert str(tmp_path) not in said
    recorded_files(tmp_path)[0].write_bytes(b"")
    (said,) = read_recording(tmp_path).left_out
    assert said.startswith(f"2 files cannot be read, and are left out: {cut.name} (")
    assert said.endswith(f"), {recorded_files(tmp_path)[0].name}")
    for file in recorded_files(tmp_path):
        file.write_bytes(file.read_bytes()[:50])
    assert is_recording(tmp_path)
    with pytest.raises(TraceError, match="3 files are like that"):
        read_recording(tmp_path)


@pytest.mark.parametrize(
    ("array", "value", "message"),
    [
        ("format", np.array("something else"), "has the format 'something else'"),
        ("num_ranks", np.array(5), "num_ranks=5 is not divisible by num_nodes=2"),
        ("num_logical", np.array(4), "holds expert 4, outside 0..3"),
        ("load", np.ones((4, 3, EXPERTS), np.int32), "does not fit"),
        ("expert_bytes", np.array(-1.0), "not one number of 0 or above"),
        ("step_seconds", np.array(np.nan), "not one number of 0 or above"),
        ("model", np.array(7), "not a text"),
        ("samples", np.ones((2, 1, EXPERTS), np.int32), "samples"),
        ("samples", -np.ones((2, LAYERS, EXPERTS), np.int32), "not integers of 0 or above"),
    ],
)
def test_wrong_arrays_are_named(tmp_path, array, value, message):
    write_all(tmp_path, interval())
    (file,) = recorded_files(tmp_path)
    with np.load(file) as content:
        arrays = dict(content)
    np.savez(file, **{**arrays, array: value})
    with pytest.raises(TraceError, match=message):
        read_recording(file)


@pytest.mark.parametrize(
    ("array", "value", "message"),
    [
        ("layer_ids", np.array([5, 5]), r"layer_ids \(5, 5\) do not rise from 0 or above"),
        ("layer_ids", np.array([-1, 5]), r"layer_ids \(-1, 5\) do not rise from 0 or above"),
        ("layer_ids", np.array([3, 4, 5]), "3 layer_ids for 2 layers"),
        ("samples", np.ones((2, 1, EXPERTS), np.int32), r"samples \(2, 1, 8\) do not fit load \(4, 2, 8\)"),
    ],
)
def test_a_file_with_wrong_layers_leaves_the_rest_readable(tmp_path, array, value, message):
    write_all(tmp_path, interval(0), interval(1))
    newest = recorded_files(tmp_path)[1]
    with np.load(newest) as content:
        arrays = dict(content)
    np.savez(newest, **{**arrays, array: value})
    with pytest.raises(TraceError, match=f"{newest}: {message}"):
        read_interval(newest)
    read = read_recording(tmp_path)
    assert torch.equal(read.trace.load, interval(0).snapshots)
    assert newest.name in read.left_out[0]


def test_what_is_no_recording(tmp_path):
    np.savez(tmp_path / "load.npz", load=np.ones((3, 2, 4), np.int32))
    (tmp_path / "notes.npz").write_text("no archive")
    assert not is_recording(tmp_path / "load.npz")
    assert not is_recording(tmp_path / "notes.npz")
    assert not is_recording(tmp_path)
    assert not is_recording(tmp_path / "missing")
    with pytest.raises(TraceError, match="without recorded intervals"):
        read_recording(tmp_path)


def test_the_oldest_files_go_and_the_newest_stays(tmp_path):
    write_all(tmp_path, *(interval(seed) for seed in range(6)))
    (tmp_path / "mine.npz").write_bytes(b"x" * 10_000)
    files = recorded_files(tmp_path)
    sizes = [file.stat().st_size for file in files]
    remove_oldest(tmp_path, sum(sizes[3:]))
    assert recorded_files(tmp_path) == files[3:]
    remove_oldest(tmp_path, 1)
    assert recorded_files(tmp_path) == files[5:]
    assert (tmp_path / "mine.npz").exists()


def test_names_sort_by_time():
    moments = [(1e9, 1), (1e9, 2), (1e9, 10), (1e9 + 0.5, 1), (1e9 + 0.75, 1), (1e9 + 3600, 1)]
    names = [next_name(*moment) for moment in moments]
    assert names == sorted(names)
    assert len(set(names)) == len(names)


def record_for_ever(folder):
    """A child process: serve and record as fast as the recorder takes intervals."""
    torch.set_num_threads(1)
    options = RebalancerOptions(
        mode="observe", interval=8, snapshots=4, record=str(folder), background_share=1.0
    )
    loop = Rebalancer(Topology(num_ranks=1, num_slots=320), 40, 256, options=options)
    ids = torch.arange(256)
    for step in range(10**9):
        for layer in range(40):
            loop.record_counts(layer, (ids * 7919 + step) % 1000)
        loop.step()


def test_a_recording_outlives_sigkill_at_any_moment(tmp_path):
    """A real process is killed again and again while it records; every file that is there is whole."""
    for attempt in range(6):
        count = len(recorded_files(tmp_path))
        process = multiprocessing.get_context("fork").Process(target=record_for_ever, args=(tmp_path,))
        process.start()
        until = time.monotonic() + 60
        while len(recorded_files(tmp_path)) < count + 3 and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(0.003 * attempt)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        files = recorded_files(tmp_path)
        assert len(files) >= count + 3
        recording = read_recording(tmp_path)
        assert recording.left_out == ()
        assert recording.trace.num_steps >= 4 * len(files)
    # What a killed process left half-written goes when another one writes.
    (tmp_path / "interval-20000101T000000.000000-00000001.npz.999999999.part").write_bytes(b"half")
    remove_oldest(tmp_path, 2**30)
    assert not list(tmp_path.glob("*.part"))
