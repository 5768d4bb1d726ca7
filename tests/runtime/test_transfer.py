"""Weights on real processes: byte for byte where the map says, in hops that keep to the staging bound."""

from __future__ import annotations

from collections import defaultdict
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eplb_plugin as eplb
from eplb_plugin.runtime.control.rank_group import RankGroup
from eplb_plugin.runtime.control.scheduling import AtOnce
from eplb_plugin.runtime.weights import expert_weights as rows_of_weights
from eplb_plugin.runtime.weights import layout as layouts
from eplb_plugin.runtime.weights.batching import Hop, plan_hops
from eplb_plugin.runtime.weights.expert_weights import ExpertWeights, byte_rows
from eplb_plugin.runtime.weights.layout import Layout
from eplb_plugin.runtime.weights.migration import Sends
from eplb_plugin.runtime.weights.rounds import cut, plan_rounds
from eplb_plugin.runtime.weights.staging import Arrival, Staging
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
    piece: int | None = None,
    most: int | None = None,
) -> list[eplb.Placement]:
    """Move weights without any of the agreement around it; the placements after each hop."""
    hops, impossible = plan_hops(
        old.physical_to_logical, new.physical_to_logical, weights, topology, staging.bound
    )
    assert not impossible
    placements = []
    transport = Transport(group)
    now = old.physical_to_logical.clone()
    for hop in hops:
        layout = Layout(hop, weights, topology, group.rank, piece, most)
        assert layout.num_bytes == int(hop.staged[group.rank])
        layout.place(staging.reserve(layout.num_bytes, torch.device("cpu")))
        assert most is None or all(max(len(r.sends), len(r.receives)) <= most for r in layout.rounds)
        transfer = Transfer(layout, transport)
        checked: list[tuple[Arrival, list[torch.Tensor]]] = []
        transfer.fill_first()
        transfer.start()
        for arrivals in transfer.receive(DeviceOrder(torch.device("cpu")), AtOnce().throttle):
            checked += [(arrival, [row.clone() for row in arrival.rows]) for arrival in arrivals]
        assert transfer.failure is None
        # Each was checked once, when all of it had arrived.
        assert len({id(arrival) for arrival, _ in checked}) == len(checked)
        assert sorted((a.layer, a.expert) for a, _ in checked) == sorted(arriving(hop, topology, group.rank))
        assert all(torch.equal(*pair) for a, rows in checked for pair in zip(a.rows, rows, strict=True))
        for layer in hop.layers:
            transfer.commit(layer)
        now[hop.layers] = hop.after
        placements.append(eplb.Placement(now, old.num_logical))
    return placements


def arriving(hop: Hop, topology: eplb.Topology, rank: int) -> list[tuple[int, int]]:
    """(layer, expert) of what a rank gets from others, once each, and of what it copies, slot by slot."""
    sends, copies = hop.migration.sends, hop.migration.copies
    got = [
        (hop.layers[layer], expert)
        for layer, expert, to in zip(
            sends.layer.tolist(), sends.expert.tolist(), sends.rank.tolist(), strict=True
        )
        if to == rank
    ]
    return got + [
        (hop.layers[layer], int(hop.after[layer, slot]))
        for layer, slot, at in zip(
            copies.layer.tolist(), copies.slot.tolist(), copies.rank.tolist(), strict=True
        )
        if at == rank
    ]


# Many messages and lots, although little is moved.
@mock.patch.object(layouts, "_SHARED", 1 << 10)
@mock.patch.object(layouts, "_FEWEST", 1)
@mock.patch.object(layouts, "_LOTS", 5)
@mock.patch.object(rows_of_weights, "_OWN_MESSAGE", OWN)
def move_around(
    rank: int,
    size: int,
    slots_per_rank: int,
    staging_bytes: int,
    piece: int | None = None,
    most: int | None = None,
) -> tuple[int, int]:
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
    most_hops = 0
    staging = Staging(staging_bytes)
    for seed in range(1, 6):
        new = random_placement(layers, logical, slots, seed)
        hops = carry(placement, new, registered, topology, group, staging, piece, most)
        assert hops[-1] == new
        assert wrong_rows(weights, new, mine) == []
        most_hops = max(most_hops, len(hops))
        placement = new
    return most_hops, staging.num_bytes


@pytest.mark.parametrize(("size", "slots_per_rank"), [(2, 4), (4, 3)])
def test_every_byte_is_where_the_map_says(size: int, slots_per_rank: int) -> None:
    at_once = run_ranks(move_around, size, size, slots_per_rank, 1 << 30)
    assert {hops for hops, _ in at_once} == {1}


@pytest.mark.parametrize("bound", [1_000_000, 400_000])
def test_staging_keeps_to_its_bound(bound: int) -> None:
    # All four layers need 2.4 MB, one of them 0.6 MB: hops of some layers, and hops of parts of a layer.
    results = run_ranks(move_around, 2, 2, 4, bound)
    assert len({hops for hops, _ in results}) == 1
    assert results[0][0] > (1 if bound == 1_000_000 else 4)
    assert max(num_bytes for _, num_bytes in results) <= bound


@pytest.mark.parametrize(
    ("piece", "most"), [(1 << 30, None), (100_000, None), (1000, None), (None, 3), (None, 7), (300_000, 5)]
)
def test_rounds_of_any_size_carry_the_same(piece: int | None, most: int | None) -> None:
    # An expert has 140 kB and 3 messages: all of a hop at once, expert by expert, and in pieces of tensors.
    results = run_ranks(move_around, 4, 4, 3, 1 << 30, piece, most)
    assert {hops for hops, _ in results} == {1}


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 3)), max_size=40),
    st.integers(1, 50),
    st.none() | st.integers(1, 9),
)
def test_no_rank_sends_or_receives_more_than_a_piece_or_too_many_messages_in_a_round(
    triples: list[tuple[int, int, int]], piece: int, messages: int | None
) -> None:
    limits = [([3, 10, 25], piece)]
    if messages is not None:
        limits.append(([1, 4, 2], messages))
    layer, source, rank = torch.tensor(sorted(triples), dtype=torch.int64).view(-1, 3).unbind(1)
    sends = Sends(layer=layer, expert=layer, source_rank=source, source_slot=source, rank=rank)
    rounds = plan_rounds(sends, 4, limits)
    assert rounds == sorted(rounds)
    assert set(rounds) == set(range(max(rounds, default=-1) + 1))
    for each, most in limits:
        for number in set(rounds):
            for ends in (source, rank):
                for end in range(4):
                    there = [
                        each[int(layer[at])]
                        for at, other in enumerate(rounds)
                        if other == number and int(ends[at]) == end
                    ]
                    assert sum(there) <= most or len(there) == 1
    assert plan_rounds(sends, 4) == [0] * len(triples)


@given(st.lists(st.integers(1, 50), max_size=5), st.none() | st.integers(1, 60))
def test_cut_pieces_are_all_of_an_expert_once(sizes: list[int], piece: int | None) -> None:
    parts: dict[int, int] = defaultdict(int)
    covered: list[tuple[int, int]] = []
    for part, tensor, first, last in cut(sizes, piece):
        parts[part] += last - first
        covered += [(tensor, byte) for byte in range(first, last)]
        assert piece is None or last - first <= piece
    assert covered == [(tensor, byte) for tensor, size in enumerate(sizes) for byte in range(size)]
    assert piece is None or all(num_bytes < 2 * piece for num_bytes in parts.values())
    assert piece is not None or set(parts) <= {0}


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
