"""The load window against plain counting, and that recording allocates nothing."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

import eplb_plugin as eplb
from eplb_plugin.runtime.load_window import LoadWindow


def window(**changes: int) -> LoadWindow:
    return LoadWindow(
        **{"num_layers": 2, "num_logical": 4, "interval": 6, "snapshots": 3, "history": 2} | changes
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    interval=st.integers(1, 9),
    snapshots=st.integers(1, 5),
    done=st.integers(0, 12),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
@example(seed=0, interval=10, snapshots=3, done=4, dtype=torch.int64)
def test_counts_like_a_loop(seed: int, interval: int, snapshots: int, done: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    recorder = window(interval=interval, snapshots=snapshots)
    steps = []
    for _ in range(done):
        expected = torch.zeros(2, 4, dtype=torch.int64)
        dummy = bool(torch.rand((), generator=generator) < 0.2)
        for layer in range(2):
            tokens = int(torch.randint(6, (), generator=generator))
            shape = (tokens, 3) if layer else (tokens,)
            ids = torch.randint(-1, 4, shape, generator=generator).to(dtype)
            valid = torch.rand(tokens, generator=generator) < 0.7 if seed % 2 else None
            recorder.record(layer, ids, valid)
            for token, row in enumerate(ids.reshape(tokens, 3 if layer else 1).tolist()):
                for expert in row:
                    if expert >= 0 and not dummy and (valid is None or valid[token]):
                        expected[layer, expert] += 1
        recorder.step(is_dummy=dummy)
        steps.append(expected)
    taken = recorder.take().snapshots
    used = min(snapshots, interval)
    folded: list[torch.Tensor] = []  # those that steps have reached; the last takes steps beyond the interval
    for index, counts in enumerate(steps):
        snapshot = min(index * used // interval, used - 1)
        if snapshot == len(folded):
            folded.append(torch.zeros_like(counts))
        folded[snapshot] += counts
    assert taken.shape == (len(folded), 2, 4)
    assert all(torch.equal(*both) for both in zip(taken, folded, strict=True))
    assert recorder.take().snapshots.shape == (0, 2, 4)


def test_counts_of_the_engine_add_up() -> None:
    recorder = window(interval=1)
    recorder.record(1, torch.tensor([[0, 3]]))
    recorder.record_counts(1, torch.tensor([0, 5, 0, 1], dtype=torch.int32))
    recorder.step()
    assert recorder.take().snapshots.tolist() == [[[0, 0, 0, 0], [1, 5, 0, 2]]]


def test_history_is_bounded_in_time_order_and_can_be_dropped() -> None:
    recorder = window()
    for value in (1, 2, 3):
        recorder.push(torch.full((2, 2, 4), value))
    assert recorder.load()[:, 0, 0].tolist() == [2, 2, 3, 3]
    recorder.record(0, torch.tensor([1]))
    recorder.clear()
    recorder.step()
    assert recorder.load().shape == (0, 2, 4)
    assert not recorder.take().snapshots.any()


def test_recording_works_in_and_out_of_inference_mode() -> None:
    with torch.inference_mode():
        recorder = window()
        recorder.record(0, torch.tensor([[1, 2]]), torch.tensor([True]))
    recorder.record(0, torch.tensor([[1, 2]]), torch.tensor([True]))
    recorder.step()
    assert recorder.take().snapshots[0, 0].tolist() == [0, 2, 2, 0]


def test_a_larger_batch_leaves_what_a_graph_writes_to() -> None:
    recorder = window(interval=1)
    written = []  # what graphs captured for these batches would write to, without a hold on the memory
    for tokens in (3, 8, 9, 40):
        recorder.record(0, torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens, dtype=torch.bool))
        for used in (recorder._ids, recorder._mask):
            written.append((weakref.ref(used), used.data_ptr()))
        del used
    for found, address in written:
        tensor = found()
        assert tensor is not None
        assert tensor.data_ptr() == address
    recorder.step()
    assert recorder.take().snapshots[0, 0].tolist() == [60, 0, 0, 0]
    assert sum(tensor.numel() for tensor in recorder._outgrown) <= 2 * recorder._ids.numel()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_recording_allocates_nothing_after_the_first_step(masked: bool, dtype: torch.dtype) -> None:
    recorder = window(interval=100)
    ids = torch.zeros(64, 2, dtype=dtype)
    valid = torch.ones(64, dtype=torch.bool) if masked else None
    counts = torch.ones(4, dtype=torch.int64)

    def step() -> None:
        for layer in range(2):
            recorder.record(layer, ids, valid)
            recorder.record(layer, ids[:10], None if valid is None else valid[:10])
            recorder.record_counts(layer, counts)
        recorder.step()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        for _ in range(3):
            step()
    allocated = [event for event in trace.events() if event.cpu_memory_usage > 0 or event.name == "[memory]"]
    assert allocated == []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        ids + 1  # the check sees what does allocate
    assert any(event.cpu_memory_usage > 0 for event in trace.events())


@pytest.mark.parametrize(
    ("call", "numbers"),
    [
        (lambda w: w.record(2, torch.tensor([0])), "layer=2 is outside 0..1"),
        (lambda w: w.record(0, torch.tensor([0.0])), "float32"),
        (lambda w: w.record(0, torch.zeros(1, 1, 1, dtype=torch.int64)), r"\(1, 1, 1\)"),
        (lambda w: w.record(0, torch.tensor([0]), torch.tensor([True, True])), r"\(2,\), not bool \(1,\)"),
        (lambda w: w.record_counts(0, torch.zeros(3, dtype=torch.int64)), r"\(3,\), not integers \(4,\)"),
        (lambda w: w.push(torch.zeros(1, 2, 5).long()), r"\(1, 2, 5\), not \[any number, 2, 4\]"),
        (lambda w: w.record(0, torch.zeros(1, dtype=torch.int64, device="meta")), "meta"),
        (lambda w: w.push(torch.full((1, 2, 4), -1.0)), "interval_load has dtype torch.float32, not int64"),
        (lambda w: window(snapshots=0), "snapshots=0 is below 1"),
        (lambda w: window(interval=1.5), "interval=1.5 is not an integer"),
        (lambda w: window(history=True), "history=True is not an integer"),
    ],
)
def test_errors_name_the_numbers(call, numbers: str) -> None:
    with pytest.raises(eplb.LoadError, match=numbers):
        call(window())


@pytest.mark.parametrize("expert", [4, -2])
def test_ids_beyond_the_experts_do_not_pass(expert: int) -> None:
    with pytest.raises((RuntimeError, IndexError)):
        window().record(0, torch.tensor([expert]))


@pytest.mark.parametrize(
    ("interval", "samples", "sampled"), [(6, 3, [0, 2, 4]), (5, 2, [0, 2]), (3, 8, [0, 1, 2])]
)
def test_samples_are_single_steps_evenly_spaced(interval: int, samples: int, sampled: list[int]) -> None:
    recorder = window(interval=interval, samples=samples)
    for steps in (interval, 2, interval + 4):
        for step in range(steps):
            for layer in range(2):
                recorder.record(layer, torch.tensor([step % 4] * (step + 1)))
            recorder.step(is_dummy=step == 2)
        taken = recorder.take().samples
        wanted = torch.zeros(0, 2, 4, dtype=torch.int64)
        for step in [s for s in sampled if s < steps]:
            counts = torch.zeros(1, 2, 4, dtype=torch.int64)
            counts[..., step % 4] = 0 if step == 2 else step + 1
            wanted = torch.cat([wanted, counts])
        assert torch.equal(taken, wanted)
