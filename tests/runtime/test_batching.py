"""Migration batches: each fits, each leaves a valid placement, and the last one ends at the goal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eplb_plugin as eplb
from eplb_plugin.runtime.weights.batching import plan_batches, staging_bytes
from eplb_plugin.runtime.weights.expert_weights import ExpertWeights
from tests.runtime.cases import random_placement


def make_weights(layers: int, topology: eplb.Topology) -> ExpertWeights:
    """One tensor that is sent by itself, 512 KiB an expert, and a small one that shares messages."""
    spr = topology.slots_per_rank
    return ExpertWeights(
        [[torch.zeros(spr, 128 * 1024), torch.zeros(spr, 64)] for _ in range(layers)], topology
    )


@settings(deadline=None)
@given(
    ranks=st.integers(1, 4),
    slots_per_rank=st.integers(1, 6),
    spare=st.integers(0, 4),
    experts_at_once=st.integers(2, 12),
    seed=st.integers(0, 10_000),
)
def test_batches_fit_and_every_one_leaves_a_placement(
    ranks: int, slots_per_rank: int, spare: int, experts_at_once: int, seed: int
) -> None:
    topology = eplb.Topology(num_ranks=ranks, num_slots=ranks * slots_per_rank)
    logical = max(1, topology.num_slots - spare)
    weights = make_weights(3, topology)
    old, new = (random_placement(3, logical, topology.num_slots, seed + x) for x in (0, 1))
    bound = experts_at_once * (weights.staged_bytes[0] + weights.coalesced_bytes[0])
    before, after = old.physical_to_logical, new.physical_to_logical
    batches, impossible = plan_batches(before, after, weights, topology, bound)
    now = before.clone()
    for batch in batches:
        now[batch.layers] = batch.physical_to_logical
        eplb.Placement(now, logical)  # every expert has a slot
        need = staging_bytes(batch.migration, batch.layers, weights, topology)
        assert torch.equal(need.sum(0), batch.staging_bytes)
        assert int(batch.staging_bytes.max()) <= bound
    for layer, reason in impossible.items():
        # Only a ring of experts without spare replicas has to move at once.
        assert "staging_mib" in reason
        assert experts_at_once < topology.num_slots
        after[layer] = now[layer]
    assert torch.equal(now, after)


def test_a_ring_too_large_for_the_bound_is_refused_and_a_spare_slot_lets_it_through() -> None:
    topology = eplb.Topology(num_ranks=4, num_slots=4)
    ring = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[1, 2, 3, 0]])
    weights = make_weights(1, topology)
    one = weights.staged_bytes[0] + weights.coalesced_bytes[0]
    assert plan_batches(*ring, weights, topology, one)[1] == {}
    batches, impossible = plan_batches(*ring, weights, topology, one - 1)
    assert batches == []
    assert list(impossible) == [0]
    assert "exchange 4 slots" in impossible[0]
    # One expert less: two slots of a rank change one after the other.
    topology = eplb.Topology(num_ranks=2, num_slots=4)
    weights = make_weights(1, topology)
    way = torch.tensor([[0, 1, 2, 2]]), torch.tensor([[2, 0, 1, 1]])
    assert len(plan_batches(*way, weights, topology, 1 << 30)[0]) == 1
    batches, impossible = plan_batches(*way, weights, topology, 2 * one)
    assert impossible == {}
    assert len(batches) >= 1


def test_empty_slots_are_filled_from_any_replica() -> None:
    topology = eplb.Topology(num_ranks=2, num_slots=4)
    held, goal = torch.tensor([[-1, 1, 0, 2]]), torch.tensor([[0, 1, 0, 2]])
    (batch,), impossible = plan_batches(held, goal, make_weights(1, topology), topology, 1 << 30)
    assert impossible == {}
    migration = batch.migration
    assert migration.num_sends == 1
    assert migration.sends.source_slot.tolist() == [2]


@pytest.mark.parametrize("layers", [1, 3])
def test_nothing_to_do_is_no_batch(layers: int) -> None:
    topology = eplb.Topology(num_ranks=2, num_slots=4)
    rows = random_placement(layers, 3, 4, 1).physical_to_logical
    assert plan_batches(rows, rows.clone(), make_weights(layers, topology), topology, 1) == ([], {})
