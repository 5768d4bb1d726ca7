"""Dispatch: right slots, even spreading, local replicas, and buffers that keep their addresses."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eplb_plugin as eplb
from eplb_plugin.dispatch.even import EvenDispatch
from eplb_plugin.dispatch.local_first import LocalFirstDispatch
from eplb_plugin.dispatch.registry import DISPATCHES, Serving, find_dispatch
from tests.runtime.cases import random_placement

TOPOLOGY = eplb.Topology(num_ranks=4, num_slots=12)


def buffers(tables: EvenDispatch) -> list[torch.Tensor]:
    return [tables._slots, tables._first, tables._count]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), rank=st.integers(0, 3), name=st.sampled_from(sorted(DISPATCHES)))
def test_tokens_go_to_slots_that_hold_their_expert(seed: int, rank: int, name: str) -> None:
    placement = random_placement(3, 7, 12, seed)
    tables = find_dispatch(name)(placement, TOPOLOGY, Serving(rank))
    generator = torch.Generator().manual_seed(seed)
    for dtype in (torch.int32, torch.int64):
        ids = torch.randint(-1, 7, (20, 3), generator=generator).to(dtype)
        for layer in range(3):
            slots = tables.physical(layer, ids)
            assert slots.dtype == dtype
            held = placement.physical_to_logical[layer][slots.clamp(min=0).long()].to(dtype)
            assert torch.equal(torch.where(ids >= 0, held, -1), ids)
            assert torch.equal(slots < 0, ids < 0)
            if name == "local_first":
                mine = placement.physical_to_logical[layer, TOPOLOGY.slots_of_rank(rank)]
                has_local = torch.isin(ids, mine.to(dtype))
                assert torch.equal(has_local, (slots // 3 == rank) & (slots >= 0))
    if name != "balanced":  # whose slots depend on the whole batch
        assert torch.equal(tables.physical(0, ids[:, 0]), tables.physical(0, ids)[:, 0])


@pytest.mark.parametrize("replicas", [2, 3, 4, 5])
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 7, 8, 16])
def test_runs_and_strides_of_tokens_spread_evenly(replicas: int, stride: int) -> None:
    # The hot expert is chosen by every `stride`-th token, as when topics alternate in a batch.
    placement = eplb.Placement(torch.tensor([[0] * replicas + list(range(1, 13 - replicas))]), 13 - replicas)
    for rank in range(4):
        tables = EvenDispatch(placement, TOPOLOGY, rank=rank)
        for tokens in (10, 100, 1000):
            ids = torch.full((tokens * stride,), -1)
            ids[::stride] = 0
            slots = tables.physical(0, ids)
            share = torch.bincount(slots[slots >= 0], minlength=replicas)
            assert (share - tokens / replicas).abs().max() <= (2 if stride == 1 else 7), share


def test_ranks_start_at_different_replicas() -> None:
    placement = eplb.Placement(torch.tensor([[0, 1, 2, 0, 3, 4, 0, 5, 6, 0, 7, 8]]), 9)
    first = [
        int(EvenDispatch(placement, TOPOLOGY, rank=rank).physical(0, torch.tensor([0]))) for rank in range(4)
    ]
    assert sorted(first) == [0, 3, 6, 9]


def test_local_replicas_share_among_themselves() -> None:
    placement = eplb.Placement(torch.tensor([[0, 0, 1, 0, 2, 3, 4, 5, 6, 7, 8, 0]]), 9)
    tables = LocalFirstDispatch(placement, TOPOLOGY, rank=0)
    assert sorted(tables.physical(0, torch.zeros(8, dtype=torch.int64)).unique().tolist()) == [0, 1]
    assert tables.replica_count[0, 0] == 2
    other = LocalFirstDispatch(placement, TOPOLOGY, rank=2)
    assert sorted(other.physical(0, torch.zeros(50, dtype=torch.int64)).unique().tolist()) == [0, 1, 3, 11]


@pytest.mark.parametrize("name", sorted(DISPATCHES))
def test_no_token_goes_to_an_empty_slot(name: str) -> None:
    # Rank 1 of three has failed; ranks differ in slots.
    topology = eplb.Topology(num_ranks=3, num_slots=7, rank_slots=(3, 2, 2))
    rows = torch.tensor([[0, 1, 2, -1, -1, 0, 1], [2, 0, 1, -1, -1, 2, 2]])
    tables = find_dispatch(name)(eplb.Placement(rows, 3), topology, Serving(2))
    ids = torch.arange(3).repeat(20)
    for layer in range(2):
        slots = tables.physical(layer, ids)
        assert torch.equal(rows[layer][slots], ids)
        used = {e: set(slots[ids == e].tolist()) for e in range(3)}
        for expert in range(3):
            holders = set((rows[layer] == expert).nonzero()[:, 0].tolist())
            local = holders & {5, 6}
            if name == "balanced":
                assert used[expert] <= holders
            else:
                assert used[expert] == (local if local and name == "local_first" else holders)


def test_updates_are_in_place_and_only_for_the_given_layers() -> None:
    old, new = random_placement(3, 7, 12, 0), random_placement(3, 7, 12, 1)
    with torch.inference_mode():
        tables = EvenDispatch(old, TOPOLOGY)
    where = [buffer.data_ptr() for buffer in buffers(tables)]
    tables.update(new, [1])
    tables.update(new, [])
    mixed = old.with_layers(torch.tensor([1]), new)
    assert [buffer.data_ptr() for buffer in buffers(tables)] == where
    assert torch.equal(tables.logical_to_physical, mixed.logical_to_physical)
    assert torch.equal(tables.replica_count, mixed.replica_count)


def test_a_larger_batch_leaves_what_a_graph_reads() -> None:
    tables = EvenDispatch(random_placement(3, 7, 12, 0), TOPOLOGY, rank=1)
    ids = torch.arange(300) % 7
    read = []  # what graphs captured for these batches would read: addresses, without a hold on the memory
    slots = []
    for tokens in (5, 64, 65, 300):
        slots.append(tables.physical(0, ids[:tokens]))
        used = tables._spread
        read.append((weakref.ref(used), used.data_ptr(), used.tolist()))
        del used
    for found, address, content in read:
        tensor = found()
        assert tensor is not None
        assert tensor.data_ptr() == address
        assert tensor.tolist() == content == tables._spread[: len(content)].tolist()
    for chosen in slots:
        assert torch.equal(chosen, slots[-1][: len(chosen)])
    assert sum(tensor.numel() for tensor in tables._outgrown) <= tables._spread.numel()


def test_what_does_not_fit_is_refused() -> None:
    tables = EvenDispatch(random_placement(3, 7, 12, 0), TOPOLOGY)
    assert tables.physical(0, torch.empty(0, 2, dtype=torch.int64)).shape == (0, 2)
    with pytest.raises(eplb.LoadError, match="layer 3 of 3"):
        tables.physical(3, torch.tensor([0]))
    before = tables.logical_to_physical.clone()
    with pytest.raises(eplb.PlacementError, match=r"tables of \(3, 7\) layers and experts"):
        tables.update(random_placement(3, 6, 12, 0))
    for ids, told in (
        (torch.arange(11)[None] % 7, r"shape \(1, 11\) .* tables of 12 slots"),
        (torch.arange(12)[None], r"experts 0..11 does not fit"),
        (torch.arange(12)[None] % 7 - 2, r"experts -2..4 does not fit"),
        (torch.arange(12)[None] % 7 - 1, "layer 2 has no slot for expert 6 of 7"),
    ):
        with pytest.raises(eplb.PlacementError, match=told):
            tables.prepare(ids, [2])
    assert torch.equal(tables.logical_to_physical, before)
    for expert in (-2, 7):
        with pytest.raises((IndexError, RuntimeError)):
            tables.physical(2, torch.tensor([expert]))


def test_an_unknown_dispatch_is_named_with_those_there_are() -> None:
    with pytest.raises(
        eplb.ConfigError, match="dispatch='nearest' is unknown; there are even, local_first, balanced"
    ):
        find_dispatch("nearest")


def test_tables_take_memory_by_slots_not_by_replica_counts() -> None:
    # 128 layers of 1,024 experts in 2,048 slots, where one expert could have 1,025 replicas.
    topology = eplb.Topology(num_ranks=32, num_slots=2048)
    tables = EvenDispatch(eplb.Placement.default(128, 1024, 2048), topology)
    assert sum(8 * buffer.numel() for buffer in buffers(tables)) < 5 * 2**20
