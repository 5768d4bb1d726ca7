"""Topology, Placement and the metrics, against element-by-element oracles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eplb_plugin as eplb
from eplb_plugin import (
    LoadError,
    Placement,
    PlacementError,
    Topology,
    TopologyError,
    balancedness,
    count_moves,
    rank_loads,
)
from eplb_plugin.core.load import fold_steps


@st.composite
def placements(draw, count: int = 1) -> tuple[Topology, list[Placement]]:
    ranks, slots_per_rank = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    layers, slots = draw(st.integers(1, 3)), ranks * slots_per_rank
    experts = draw(st.integers(1, slots))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def row() -> torch.Tensor:
        extra = torch.randint(-1, experts, (slots - experts,), generator=generator)  # some slots stay empty
        return torch.cat([torch.arange(experts), extra])[torch.randperm(slots, generator=generator)]

    made = [Placement(torch.stack([row() for _ in range(layers)]), experts) for _ in range(count)]
    if draw(st.booleans()):
        return Topology(num_ranks=ranks, num_slots=slots), made
    cuts = sorted(draw(st.lists(st.integers(0, slots), min_size=ranks - 1, max_size=ranks - 1)))
    rank_slots = tuple(b - a for a, b in zip([0, *cuts], [*cuts, slots], strict=True))
    return Topology(num_ranks=ranks, num_slots=slots, rank_slots=rank_slots), made


@given(placements(), st.integers(1, 3), st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_rank_loads_and_balancedness(case, snapshots, seed):
    topology, (placement,) = case
    shape = (snapshots, placement.num_layers, placement.num_logical)
    load = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed))
    expected = torch.zeros(*shape[:2], topology.num_ranks, dtype=torch.float64)
    rank_of = topology.rank_of_slot().tolist()
    holding = set()
    for layer, row in enumerate(placement.physical_to_logical.tolist()):
        for slot, expert in enumerate(row):
            if expert >= 0:
                expected[:, layer, rank_of[slot]] += load[:, layer, expert].double() / row.count(expert)
                holding.add(rank_of[slot])
    assert torch.allclose(rank_loads(load, placement, topology), expected)
    # Ranks that hold nothing anywhere do not count in the mean.
    expected = expected[:, :, sorted(holding)]
    ratios = [float(step.mean(1).sum() / step.amax(1).sum()) for step in expected if step.sum() > 0]
    assert balancedness(load, placement, topology) == pytest.approx(
        sum(ratios) / len(ratios) if ratios else 1.0
    )


@given(placements(2))
@settings(max_examples=60, deadline=None)
def test_count_moves(case):
    topology, (old, new) = case
    expected = []
    for before, after in zip(old.physical_to_logical, new.physical_to_logical, strict=True):
        ranks = [topology.slots_of_rank(rank) for rank in range(topology.num_ranks)]
        expected.append(sum(len(set(after[r].tolist()) - set(before[r].tolist()) - {-1}) for r in ranks))
    assert count_moves(old, new, topology).tolist() == expected
    assert count_moves(old, old, topology).sum() == 0


@given(placements())
@settings(max_examples=60, deadline=None)
def test_the_tables_of_experts_leave_empty_slots_out(case):
    _, (placement,) = case
    for layer, row in enumerate(placement.physical_to_logical.tolist()):
        for expert in range(placement.num_logical):
            slots = [slot for slot, held in enumerate(row) if held == expert]
            assert int(placement.replica_count[layer, expert]) == len(slots)
            table = placement.logical_to_physical[layer, expert].tolist()
            assert table == slots + [-1] * (len(table) - len(slots))
    assert placement.has_empty_slots == bool((placement.physical_to_logical == -1).any())


def test_the_default_placement_wraps_round():
    placement = Placement.default(2, 4, 6)
    assert placement.physical_to_logical.tolist() == [[0, 1, 2, 3, 0, 1]] * 2
    assert placement.logical_to_physical[0].tolist() == [[0, 4], [1, 5], [2, -1], [3, -1]]
    with pytest.raises(TopologyError, match="num_logical=7"):
        Placement.default(1, 7, 6)


def test_a_placement_keeps_its_own_copy():
    ids = torch.tensor([[0, 1, 1]])
    placement = Placement(ids, 2)
    ids[0, 0] = 1
    assert placement.physical_to_logical.tolist() == [[0, 1, 1]]
    assert placement == Placement(torch.tensor([[0, 1, 1]], dtype=torch.int32), 2)
    assert placement != Placement(torch.tensor([[1, 0, 1]]), 2)


def test_layers_of_two_placements_mix():
    a, b = Placement(torch.tensor([[0, 1], [0, 1]]), 2), Placement(torch.tensor([[1, 0], [1, 0]]), 2)
    assert a.with_layers(torch.tensor([1]), b).physical_to_logical.tolist() == [[0, 1], [1, 0]]
    with pytest.raises(PlacementError, match=r"\(2, 2\) and \(1, 2\)"):
        a.with_layers(torch.tensor([0]), Placement(torch.tensor([[0, 1]]), 2))


@pytest.mark.parametrize(
    ("ids", "num_logical", "message"),
    [
        (torch.tensor([0, 1]), 2, r"shape \(2,\)"),
        (torch.zeros(1, 0, dtype=torch.int64), 2, r"shape \(1, 0\)"),
        (torch.tensor([[0.0, 1.0]]), 2, "float32"),
        (torch.tensor([[0, -2]]), 2, "layer 0, slot 1 holds expert -2, outside 0..1 .-1 for an empty slot"),
        (torch.tensor([[0, 1], [0, 2]]), 2, "layer 1, slot 1 holds expert 2, outside 0..1"),
        (torch.tensor([[0, 1], [0, 0]]), 2, "layer 1 has no slot for expert 1 of 2"),
        (torch.tensor([[0, 1]]), 0, "num_logical=0"),
        ([[0, 1]], 2, "list"),
    ],
)
def test_bad_placements_are_refused(ids, num_logical, message):
    with pytest.raises(PlacementError, match=message):
        Placement(ids, num_logical)


def test_integers_of_numpy_become_those_of_python():
    topology = Topology(num_ranks=np.int64(4), num_slots=np.uint8(9), rank_slots=np.array([3, 2, 2, 2]))
    assert topology == Topology(num_ranks=4, num_slots=9, rank_slots=(3, 2, 2, 2))
    numbers = (topology.num_ranks, topology.num_slots, *topology.slots_by_rank)
    assert {type(number) for number in numbers} == {int}
    assert type(Placement(torch.tensor([[0, 1]]), np.int32(2)).num_logical) is int


@pytest.mark.parametrize("rank_slots", [None, (3, 1, 2)])
def test_the_default_device_of_torch_is_not_used(rank_slots):
    def tables():
        topology = Topology(num_ranks=3, num_slots=6, rank_slots=rank_slots)
        values = torch.arange(6, device="cpu")
        padded = topology.by_rank(values, -1)
        folded = fold_steps(torch.ones(5, 1, 2, device="cpu"), 3)
        placed = Placement.default(2, 4, 6)
        spread = placed.logical_to_physical
        return [topology.rank_of_slot(), padded, topology.from_ranks(padded), folded, spread]

    expected = tables()
    with torch.device("meta"):
        found = tables()
    assert all(torch.equal(*both) for both in zip(expected, found, strict=True))


def test_loads_that_do_not_fit_the_placement():
    placement, topology = Placement.default(2, 4, 4), Topology(num_ranks=2, num_slots=4)
    with pytest.raises(LoadError, match="3 layers of 4 experts, the placement 2 of 4"):
        rank_loads(torch.ones(3, 4), placement, topology)
    with pytest.raises(PlacementError, match="4 slots, topology has 8"):
        rank_loads(torch.ones(2, 4), placement, Topology(num_ranks=2, num_slots=8))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: eplb.Topology(num_ranks=10**30, num_slots=10**30), eplb.TopologyError, "num_ranks is above"),
        (lambda: eplb.Topology(num_ranks=1, num_slots=10**12), eplb.TopologyError, "num_slots is above"),
        (lambda: eplb.Placement(torch.tensor([[0]]), 10**12), eplb.PlacementError, "1 slots are far too few"),
        (lambda: eplb.Placement(torch.tensor([[0]]), "1"), eplb.PlacementError, "='1' is not an integer"),
        (lambda: eplb.Placement(torch.tensor([[0]]), 1.5), eplb.PlacementError, "=1.5 is not an integer"),
        (
            lambda: eplb.Placement(torch.zeros(1, 1, dtype=torch.int64).to_sparse(), 1),
            eplb.PlacementError,
            "sparse",
        ),
        (
            lambda: eplb.Placement(torch.zeros(1, 1, dtype=torch.int64, device="meta"), 1),
            eplb.PlacementError,
            "meta",
        ),
        (lambda: eplb.Placement.default(-5, 1, 2), eplb.PlacementError, "num_layers=-5"),
        (lambda: eplb.Placement.default(1, 1, 2**40), eplb.TopologyError, "num_slots is above"),
        (lambda: eplb.balanced_packing(torch.ones(1, 2), "1"), eplb.TopologyError, "num_packs='1'"),
        (lambda: eplb.plan(torch.ones(1, 2), None), eplb.TopologyError, "a NoneType, not a Topology"),
        (
            lambda: eplb.plan(torch.ones(1, 2), eplb.Topology(num_ranks=1, num_slots=2), None, {}),
            eplb.ConfigError,
            "a dict, not PlannerOptions",
        ),
        (
            lambda: eplb.Topology(num_ranks=2, num_slots=4, rank_slots=4),
            eplb.TopologyError,
            "rank_slots is of type int, not integers",
        ),
        (lambda: eplb.Topology(num_ranks=True, num_slots=4), eplb.TopologyError, "num_ranks=True is not an"),
        (lambda: eplb.Topology(num_ranks=2.0, num_slots=4), eplb.TopologyError, "num_ranks=2.0 is not an"),
        (
            lambda: eplb.plan(torch.ones(1, 2), eplb.Topology(num_ranks=2, num_slots=4), active_ranks=5),
            eplb.TopologyError,
            "active_ranks is of type int, not a bool for each rank",
        ),
        (
            lambda: eplb.Topology(num_ranks=2, num_slots=4).slots_of_rank(0.5),
            eplb.TopologyError,
            "rank=0.5 is outside 0..1",
        ),
        (lambda: eplb.PlannerOptions(seed=10**5000), eplb.ConfigError, "too long to show"),
        (lambda: eplb.PlannerOptions(max_moves=10**30), eplb.ConfigError, "max_moves"),
        (lambda: eplb.PlannerOptions(**{"\n": 1}), eplb.ConfigError, r"'\\n': Extra inputs"),
    ],
)
def test_absurd_arguments_are_refused_in_a_line(make, error, message):
    with pytest.raises(error, match=message) as caught:
        make()
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)
