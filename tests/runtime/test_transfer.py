"""Weights on real processes: byte for byte where the map says, in batches that keep to the staging bound."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import eplb_plugin as eplb
from eplb_plugin.runtime.control.rank_group import RankGroup
from eplb_plugin.runtime.control.scheduling import AtOnce
from eplb_plugin.runtime.weights import expert_weights as rows_of_weights
from eplb_plugin.runtime.weights import rounds as message_rounds
from eplb_plugin.runtime.weights import staging as staged_weights
from eplb_plugin.runtime.weights.batching import MigrationBatch, plan_batches
from eplb_plugin.runtime.weights.expert_weights import ExpertWeights, byte_rows
from eplb_plugin.runtime.weights.rounds import RoundLimits
from eplb_plugin.runtime.weights.staging import Arrival, Staging, stage_batch
from eplb_plugin.runtime.weights.streams import DeviceOrder
from eplb_plugin.runtime.weights.transfer import Transfer
from eplb_plugin.runtime.weights.transport import Transport
from tests.processes import run_ranks
from tests.runtime.cases import fill, random_placement, wrong_rows

# Small and large rows (their own message, see OWN), odd sizes, scalars, and one tensor with rows apart.
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
OWN = 64 * 1024  # bytes: few enough that no test moves many
NO_LIMITS = RoundLimits()


def make_weights(slots: int, layers: int) -> list[list[torch.Tensor]]:
    """Layers of different structure: the last has one tensor, whose slots lie apart."""
    whole = [[torch.empty(slots, *shape, dtype=dtype) for shape, dtype in TENSORS] for _ in range(layers - 1)]
    return [*whole, [torch.empty(slots, 200, dtype=torch.float64)[:, 50:150]]]


def carry(
    old: eplb.Placement,
    new: eplb.Placement,
    weights: ExpertWeights,
    topology: eplb.Topology,
    group: RankGroup,
    staging: Staging,
    limits: RoundLimits = NO_LIMITS,
) -> list[eplb.Placement]:
    """Move weights without any of the agreement around it; the placements after each batch."""
    batches, impossible = plan_batches(
        old.physical_to_logical, new.physical_to_logical, weights, topology, staging.bound
    )
    assert not impossible
    placements = []
    transport = Transport(group)
    now = old.physical_to_logical.clone()
    for batch in batches:
        buffer = staging.reserve(int(batch.staging_bytes[group.rank]), torch.device("cpu"))
        staged = stage_batch(batch, weights, topology, group.rank, buffer, limits)
        most = limits.messages
        assert most is None or all(max(len(r.sends), len(r.receives)) <= most for r in staged.rounds)
        transfer = Transfer(staged, transport)
        checked: list[tuple[Arrival, list[torch.Tensor]]] = []
        transfer.fill_first()
        transfer.start()
        for arrivals in transfer.receive(DeviceOrder(torch.device("cpu")), AtOnce().throttle):
            checked += [(arrival, [row.clone() for row in arrival.rows]) for arrival in arrivals]
        assert transfer.failure is None
        # Each was checked once, when all of it had arrived.
        assert len({id(arrival) for arrival, _ in checked}) == len(checked)
        assert sorted((a.layer, a.expert) for a, _ in checked) == sorted(
            arriving(batch, topology, group.rank)
        )
        assert all(torch.equal(*pair) for a, rows in checked for pair in zip(a.rows, rows, strict=True))
        for layer in batch.layers:
            transfer.commit(layer)
        now[batch.layers] = batch.physical_to_logical
        placements.append(eplb.Placement(now, old.num_logical))
    return placements


def arriving(batch: MigrationBatch, topology: eplb.Topology, rank: int) -> list[tuple[int, int]]:
    """(layer, expert) of what a rank gets from others, once each, and of what it copies, slot by slot."""
    sends, copies = batch.migration.sends, batch.migration.copies
    got = [
        (batch.layers[layer], expert)
        for layer, expert, to in zip(
            sends.layer.tolist(), sends.expert.tolist(), sends.rank.tolist(), strict=True
        )
        if to == rank
    ]
    return got + [
        (batch.layers[layer], int(batch.physical_to_logical[layer, slot]))
        for layer, slot, at in zip(
            copies.layer.tolist(), copies.slot.tolist(), copies.rank.tolist(), strict=True
        )
        if at == rank
    ]


# Many messages and verification groups, although little is moved.
@mock.patch.object(message_rounds, "_COALESCED", 1 << 10)
@mock.patch.object(staged_weights, "_FEWEST", 1)
@mock.patch.object(staged_weights, "_GROUPS", 5)
@mock.patch.object(rows_of_weights, "_OWN_MESSAGE", OWN)
def move_around(
    rank: int, size: int, slots_per_rank: int, staging_bytes: int, limits: RoundLimits = NO_LIMITS
) -> tuple[int, int]:
    """Random migrations, each checked to the byte; returns (most batches, most staging bytes)."""
    layers, slots = 4, size * slots_per_rank
    logical = slots - 3
    topology = eplb.Topology(num_ranks=size, num_slots=slots)
    mine = topology.slots_of_rank(rank)
    weights = make_weights(slots_per_rank, layers)
    placement = random_placement(layers, logical, slots, 0)
    for layer in range(layers):
        fill(weights[layer], layer, placement.physical_to_logical[layer, mine].tolist())
    registered, group = ExpertWeights(weights, topology), RankGroup()
    most_batches = 0
    staging = Staging(staging_bytes)
    for seed in range(1, 6):
        new = random_placement(layers, logical, slots, seed)
        batches = carry(placement, new, registered, topology, group, staging, limits)
        assert batches[-1] == new
        assert wrong_rows(weights, new, mine) == []
        most_batches = max(most_batches, len(batches))
        placement = new
    return most_batches, staging.num_bytes


@pytest.mark.parametrize(("size", "slots_per_rank"), [(2, 4), (4, 3)])
def test_every_byte_is_where_the_map_says(size: int, slots_per_rank: int) -> None:
    at_once = run_ranks(move_around, size, size, slots_per_rank, 1 << 30)
    assert {batches for batches, _ in at_once} == {1}


@pytest.mark.parametrize("bound", [1_000_000, 400_000])
def test_staging_keeps_to_its_bound(bound: int) -> None:
    # All four layers need 2.4 MB, one of them 0.6 MB: batches of layers, and of parts of a layer.
    results = run_ranks(move_around, 2, 2, 4, bound)
    assert len({batches for batches, _ in results}) == 1
    assert results[0][0] > (1 if bound == 1_000_000 else 4)
    assert max(num_bytes for _, num_bytes in results) <= bound


@pytest.mark.parametrize(
    ("num_bytes", "messages"),
    [(1 << 30, None), (100_000, None), (1000, None), (None, 3), (None, 7), (300_000, 5)],
)
def test_rounds_of_any_size_carry_the_same(num_bytes: int | None, messages: int | None) -> None:
    # An expert has 140 kB and 3 messages: all of a batch at once, expert by expert, and in pieces of tensors.
    results = run_ranks(move_around, 4, 4, 3, 1 << 30, RoundLimits(num_bytes, messages))
    assert {batches for batches, _ in results} == {1}


def quantised(rank: int) -> list[int]:
    topology = eplb.Topology(num_ranks=2, num_slots=2)
    tensor = torch._empty_affine_quantized([1, 4], scale=0.5, zero_point=3, dtype=torch.qint8)
    byte_rows(tensor, "t", 1)[0] = rank
    swap = [eplb.Placement(torch.tensor([order]), 2) for order in ([0, 1], [1, 0])]
    carry(*swap, ExpertWeights([[tensor]], topology), topology, RankGroup(), Staging(1 << 10))
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
        carry(old, new, ExpertWeights(weights, topology), topology, RankGroup(), Staging(1 << 30))
        assert wrong_rows(weights, new, slice(0, 6)) == []
        old = new
