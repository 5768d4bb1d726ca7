"""Weights on real processes: byte for byte where the map says, in chunks, and all or nothing."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist

import eplb_plugin as eplb
from eplb_plugin.migration import plan_migration
from eplb_plugin.runtime import transfer
from eplb_plugin.runtime.collectives import RankGroup
from eplb_plugin.runtime.weights import ExpertWeights, byte_rows
from tests.processes import run_ranks
from tests.runtime.cases import fill, random_placement, wrong_rows

# Small and large rows (their own message), odd sizes, scalars, and one tensor with rows apart.
TENSORS = [
    ((), torch.float32),
    ((3,), torch.bfloat16),
    ((5, 7), torch.float8_e4m3fn),
    ((4, 4), torch.float4_e2m1fn_x2) if hasattr(torch, "float4_e2m1fn_x2") else ((4, 4), torch.uint8),
    ((2, 2), torch.complex64),
    ((9,), torch.bool),
    ((3,), torch.uint4),
    ((70_001,), torch.int8),
    ((130, 256), torch.float16),
]


def make_weights(slots: int, layers: int) -> list[list[torch.Tensor]]:
    """Layers of different structure: the last has one tensor, whose slots lie apart."""
    whole = [[torch.empty(slots, *shape, dtype=dtype) for shape, dtype in TENSORS] for _ in range(layers - 1)]
    return [*whole, [torch.empty(slots, 200, dtype=torch.float64)[:, 50:150]]]


def move_around(rank: int, size: int, slots_per_rank: int, staging_bytes: int) -> tuple[int, int]:
    """Random migrations, each checked to the byte; returns (most chunks, most staging bytes)."""
    layers, slots = 4, size * slots_per_rank
    logical = slots - 3
    topology = eplb.Topology(num_ranks=size, num_slots=slots)
    mine = topology.slots_of_rank(rank)
    weights = make_weights(slots_per_rank, layers)
    placement = random_placement(layers, logical, slots, 0)
    for layer in range(layers):
        fill(weights[layer], layer, placement.physical_to_logical[layer, mine].tolist())
    registered, group = ExpertWeights(weights, topology), RankGroup()
    most_chunks = 0
    staging = transfer.Staging(staging_bytes)

    for seed in range(1, 6):
        new = random_placement(layers, logical, slots, seed)
        plan = plan_migration(placement, new, topology)
        committed: list[list[int]] = []
        transfer.execute(plan, registered, topology, group, staging=staging, committed=committed.append)
        assert [layer for chunk in committed for layer in chunk] == plan.layers.tolist()
        assert wrong_rows(weights, new, mine) == []
        most_chunks = max(most_chunks, len(committed))
        placement = new
    return most_chunks, staging.reserve(0, torch.device("cpu")).numel()


@pytest.mark.parametrize(("size", "slots_per_rank"), [(2, 4), (4, 3)])
def test_every_byte_is_where_the_map_says(size: int, slots_per_rank: int) -> None:
    at_once = run_ranks(move_around, size, size, slots_per_rank, 1 << 30)
    assert {chunks for chunks, _ in at_once} == {1}


def test_staging_keeps_to_its_bound_in_chunks_of_layers() -> None:
    results = run_ranks(move_around, 2, 2, 4, 1_000_000)
    assert len({chunks for chunks, _ in results}) == 1
    assert results[0][0] > 1
    assert max(num_bytes for _, num_bytes in results) <= 1_000_000


def fail_and_recover(rank: int) -> str:
    topology = eplb.Topology(num_ranks=2, num_slots=6)
    mine = topology.slots_of_rank(rank)
    old, new = random_placement(3, 5, 6, 1), random_placement(3, 5, 6, 2)
    weights = make_weights(3, 3)
    for layer in range(3):
        fill(weights[layer], layer, old.physical_to_logical[layer, mine].tolist())
    registered, group = ExpertWeights(weights, topology), RankGroup()
    plan = plan_migration(old, new, topology)
    committed: list[list[int]] = []

    def no_memory(self: transfer.Staging, num_bytes: int, device: torch.device) -> torch.Tensor:
        raise MemoryError(f"{num_bytes} bytes")

    def run() -> None:
        transfer.execute(
            plan, registered, topology, group, staging=transfer.Staging(1), committed=committed.append
        )

    allocate = no_memory if rank == 1 else transfer.Staging.reserve
    message = r"failed on 1 of 2 ranks: rank 1: MemoryError"
    with (
        mock.patch.object(transfer.Staging, "reserve", allocate),
        pytest.raises(eplb.TransferError, match=message) as caught,
    ):
        run()
    assert wrong_rows(weights, old, mine) == []
    assert committed == []

    # A failure after the first chunk: that chunk is the new placement everywhere, the rest the old one.
    stage = transfer._Stage.fill

    def fail_late(self: transfer._Stage, buffer: torch.Tensor, group: RankGroup) -> None:
        stage(self, buffer, group)
        if rank == 0 and 1 in self.layers:
            raise RuntimeError("out of order")

    with (
        mock.patch.object(transfer._Stage, "fill", fail_late),
        pytest.raises(eplb.TransferError, match="rank 0"),
    ):
        run()
    assert committed == [[0]]
    mixed = old.with_layers(torch.tensor([0]), new)
    assert wrong_rows(weights, mixed, mine) == []

    # And it recovers.
    plan = plan_migration(mixed, new, topology)
    transfer.execute(
        plan, registered, topology, group, staging=transfer.Staging(1), committed=committed.append
    )
    assert wrong_rows(weights, new, mine) == []

    # Nothing to move: no message, no collective.
    plan = plan_migration(new, new, topology)
    with (
        mock.patch.object(dist, "batch_isend_irecv") as sent,
        mock.patch.object(dist, "all_reduce") as reduced,
    ):
        run()
    assert not sent.called
    assert not reduced.called
    return str(caught.value)


def test_a_failure_before_the_commit_changes_nothing() -> None:
    assert len(set(run_ranks(fail_and_recover, 2))) == 1


def quantised(rank: int) -> list[int]:
    topology = eplb.Topology(num_ranks=2, num_slots=2)
    tensor = torch._empty_affine_quantized([1, 4], scale=0.5, zero_point=3, dtype=torch.qint8)
    byte_rows(tensor, "t", 1)[0] = rank
    swap = [eplb.Placement(torch.tensor([order]), 2) for order in ([0, 1], [1, 0])]
    plan = plan_migration(*swap, topology)
    weights = ExpertWeights([[tensor]], topology)
    transfer.execute(
        plan, weights, topology, RankGroup(), staging=transfer.Staging(1), committed=lambda layers: None
    )
    return tensor.int_repr().flatten().tolist()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_tensors_move() -> None:
    assert run_ranks(quantised, 2) == [[1] * 4, [0] * 4]


def test_one_rank_alone_moves_within_itself() -> None:
    topology = eplb.Topology(num_ranks=1, num_slots=6)
    weights = make_weights(6, 3)
    old = random_placement(3, 4, 6, 1)
    for layer in range(3):
        fill(weights[layer], layer, old.physical_to_logical[layer].tolist())
    for seed in range(5):
        new = random_placement(3, 4, 6, seed)
        transfer.execute(
            plan_migration(old, new, topology),
            ExpertWeights(weights, topology),
            topology,
            RankGroup(),
            staging=transfer.Staging(1),
            committed=lambda layers: None,
        )
        assert wrong_rows(weights, new, slice(0, 6)) == []
        old = new
