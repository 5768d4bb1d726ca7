"""The recorder, and a loop that observes: what it writes, where, and what it never does."""

from __future__ import annotations

import logging
import threading

import pytest
import torch

import eplb_plugin as eplb
from eplb_plugin.config.options import RebalancerOptions
from eplb_plugin.core.errors import ConfigError
from eplb_plugin.formats.recordings import read_interval, read_recording, recorded_files
from eplb_plugin.runtime import recorder as recorder_module
from eplb_plugin.runtime.load_window import IntervalLoad
from eplb_plugin.runtime.recorder import Recorder

from ..processes import run_ranks

TOPOLOGY = eplb.Topology(num_ranks=2, num_slots=20)
PLACEMENT = eplb.Placement.default(3, 16, 20)
KNOWN = {"expert_bytes": 5.0, "step_seconds": 0.1, "num_steps": 40}


def load(seed=0, layers=3, experts=16):
    generator = torch.Generator().manual_seed(seed)
    return IntervalLoad(
        torch.randint(1000, (4, layers, experts), generator=generator),
        torch.randint(100, (2, layers, experts), generator=generator),
    )


def test_intervals_are_written_beside_the_caller(tmp_path):
    recorder = Recorder(tmp_path / "a" / "b", 1, engine="mine", model="small", layer_ids=(1, 2, 5), copies=2)
    doubled = IntervalLoad(*(2 * part for part in load()))
    recorder.add(doubled, PLACEMENT, TOPOLOGY, **KNOWN)
    recorder.add(
        IntervalLoad(torch.zeros_like(doubled.snapshots), doubled.samples), PLACEMENT, TOPOLOGY, **KNOWN
    )
    recorder.flush()
    assert (recorder.written, recorder.lost) == (1, 0), "an interval without load is none"
    read = read_recording(tmp_path / "a" / "b")
    assert torch.equal(read.trace.load, load().snapshots), "each token was counted twice"
    assert torch.equal(read.trace.samples, load().samples)
    newest = read.newest
    assert (newest.engine, newest.model, newest.layer_ids) == ("mine", "small", (1, 2, 5))
    assert (newest.expert_bytes, newest.step_seconds, newest.steps) == (5.0, 0.1, 40)
    assert threading.active_count() == len([t for t in threading.enumerate() if t.name != "eplb-record"])


def test_the_bound_holds_after_every_interval(tmp_path):
    recorder = Recorder(tmp_path, 1)
    for seed in range(12):
        # About 300 KB each: noise does not compress.
        recorder.add(
            load(seed, 40, 1000),
            eplb.Placement.default(40, 1000, 1000),
            eplb.Topology(num_ranks=2, num_slots=1000),
            **KNOWN,
        )
        recorder.flush()
        assert sum(file.stat().st_size for file in recorded_files(tmp_path)) <= 2**20
    assert recorder.written == 12
    assert 2 <= len(recorded_files(tmp_path)) < 12
    assert torch.equal(read_recording(tmp_path).newest.snapshots.long(), load(11, 40, 1000).snapshots)


def test_a_slow_disk_loses_intervals_and_holds_nobody_up(tmp_path, monkeypatch, caplog):
    go = threading.Event()
    write = recorder_module.write_interval
    monkeypatch.setattr(recorder_module, "write_interval", lambda *a: (go.wait(60), write(*a)))
    recorder = Recorder(tmp_path, 1)
    with caplog.at_level(logging.ERROR):
        for seed in range(9):
            recorder.add(load(seed), PLACEMENT, TOPOLOGY, **KNOWN)
    assert recorder.lost >= 4
    go.set()
    recorder.flush()
    assert recorder.written + recorder.lost == 9
    assert len(recorded_files(tmp_path)) == recorder.written
    (line,) = caplog.messages
    assert "an interval is not recorded: 4 intervals wait already" in line


def test_a_folder_that_is_gone_is_said_once(tmp_path, caplog):
    recorder = Recorder(tmp_path / "gone", 1)
    (tmp_path / "gone").rmdir()
    for seed in range(3):
        recorder.add(load(seed), PLACEMENT, TOPOLOGY, **KNOWN)
        recorder.flush()
    assert (recorder.written, recorder.lost) == (0, 3)
    (line,) = caplog.messages
    assert "there is no folder" in line
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"record='.*file': cannot be made"):
        Recorder(tmp_path / "file", 1)


def observe(rank, folder, options):
    """Two ranks count different tokens for three intervals."""
    loop = eplb.Rebalancer(TOPOLOGY, 3, 16, options=RebalancerOptions(record=folder, **options))
    generator = torch.Generator().manual_seed(rank)
    counted, reports = [], []
    for _ in range(24):
        counts = torch.randint(1, 50, (3, 16), generator=generator) * torch.arange(16)
        counted.append(counts)
        for layer in range(3):
            loop.record_counts(layer, counts[layer])
        if (report := loop.step()) is not None:
            reports.append(report)
    loop.close()
    return torch.stack(counted).tolist(), reports, loop.placement.physical_to_logical.tolist()


def test_a_loop_that_observes_records_and_changes_nothing(tmp_path):
    options = {"mode": "observe", "interval": 8, "snapshots": 4, "samples": 2, "background_share": 1.0}
    ranks = run_ranks(observe, 2, str(tmp_path), options)
    total = torch.tensor(ranks[0][0]) + torch.tensor(ranks[1][0])
    read = read_recording(tmp_path)
    # The last interval may still be under way when the loop is closed.
    steps = 8 * len(recorded_files(tmp_path))
    assert steps >= 8
    assert torch.equal(read.trace.load, total[: 2 * len(read.trace.load)].view(-1, 2, 3, 16).sum(1))
    assert torch.equal(read.trace.samples, total[::4][: len(read.trace.samples)])
    assert read.newest.placement == PLACEMENT
    assert read.newest.topology == TOPOLOGY
    assert read.step_seconds > 0
    for _, reports, placement in ranks:
        assert placement == PLACEMENT.physical_to_logical.tolist()
        for report in reports:
            assert (report.moves, report.skipped, report.failed) == (0, True, False)
            assert report.reason == "mode observe plans nothing"
            assert report.balancedness_before == report.balancedness_after < 0.9


def test_intervals_that_come_too_fast_are_lost_and_their_steps_are_not_counted(tmp_path, caplog):
    """While the first of six intervals is recorded, five end, and two of them may wait."""
    options = RebalancerOptions(mode="observe", interval=4, history=2, record=str(tmp_path))
    loop = eplb.Rebalancer(eplb.Topology(num_ranks=1, num_slots=16), 3, 16, options=options)
    recorder = loop._context.recorder
    going, go_on, add = threading.Event(), threading.Event(), recorder.add

    def slow(*args, **kwargs):
        going.set()
        assert go_on.wait(60)
        add(*args, **kwargs)

    recorder.add = slow
    for step in range(24):
        for layer in range(3):
            loop.record_counts(layer, torch.full((16,), step // 4 + 1))
        loop.step()
        assert step < 3 or going.wait(60)
    go_on.set()
    loop.rebalance()
    loop.close()
    assert (recorder.written, recorder.lost) == (2, 3)
    intervals = [read_interval(file) for file in recorded_files(tmp_path)]
    assert [interval.steps for interval in intervals] == [4, 8]
    assert [int(interval.snapshots[:, 0, 0].sum()) for interval in intervals] == [4, 4 * 5 + 4 * 6]
    assert any("2 intervals wait for a rebalance to end" in line for line in caplog.messages)


def test_a_loop_that_balances_records_the_map_that_each_interval_ran_with(tmp_path):
    options = {"mode": "sync", "interval": 8, "snapshots": 4, "samples": 2}
    ranks = run_ranks(observe, 2, str(tmp_path), options)
    assert ranks[0][1][0].moves > 0
    files = recorded_files(tmp_path)
    assert len(files) == 3
    first, last = (read_recording(file).newest.placement for file in (files[0], files[-1]))
    assert first == PLACEMENT
    assert last != PLACEMENT
    assert ranks[0][1][0].sampled_balancedness is None, "the dispatch is even, samples or not"
    total = torch.tensor(ranks[0][0]) + torch.tensor(ranks[1][0])
    assert torch.equal(read_recording(tmp_path).trace.load.sum(0), total.sum(0))


def test_ranks_hear_of_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for said in run_ranks(refused, 2, str(tmp_path / "file")):
        assert "cannot be made" in said


def refused(rank, folder):
    try:
        eplb.Rebalancer(TOPOLOGY, 3, 16, options=RebalancerOptions(record=folder, mode="observe"))
    except eplb.EplbError as error:
        return str(error)
    return "nothing"
