"""Shares of slots under the dispatches of engines, against the tokens themselves."""

from __future__ import annotations

import pytest
import torch

import eplb_plugin as eplb
from eplb_plugin.core.balancedness import balancedness, rank_loads
from eplb_plugin.core.errors import PlacementError
from eplb_plugin.dispatch.shares import (
    VLLM_HASH,
    balanced_shares,
    even_shares,
    indexed_shares,
    nearest_shares,
)

from ..planning.test_fair_table import TOPOLOGIES, lognormal, random_placement


@pytest.mark.parametrize("multiplier", [1, VLLM_HASH])
def test_shares_by_index_are_those_of_all_tokens(multiplier):
    topology, logical = TOPOLOGIES[1]
    placement = random_placement(topology, logical, 3)
    batches = torch.tensor([8, 0, 5, 8, 130])
    shares = indexed_shares(placement, batches, multiplier)
    for layer in range(3):
        for expert in range(logical):
            slots = (placement.physical_to_logical[layer] == expert).nonzero()[:, 0].tolist()
            tokens = [0] * len(slots)
            for batch in batches.tolist():
                for index in range(batch):
                    tokens[index * multiplier % 2**32 % len(slots)] += 1
            expected = [count / int(batches.sum()) for count in tokens]
            assert shares[layer, slots].tolist() == pytest.approx(expected)


def test_the_hash_is_uneven_on_small_batches_alone():
    placement = eplb.Placement(torch.tensor([[0, 0, 0, 1]]), 2)
    assert indexed_shares(placement, torch.tensor([8]), VLLM_HASH).tolist() == [[0.5, 0.125, 0.375, 1]]
    large = indexed_shares(placement, torch.tensor([100_000]), VLLM_HASH)
    assert (large - even_shares(placement)).abs().max() < 1e-4
    assert torch.equal(indexed_shares(placement, torch.tensor([0])), even_shares(placement))


@pytest.mark.parametrize(("topology", "logical"), TOPOLOGIES)
def test_nearest_replicas_rank_by_rank(topology, logical):
    placement, homes = random_placement(topology, logical, 1), topology.rank_of_slot().tolist()
    per_node = topology.num_ranks // topology.num_nodes
    expected = torch.zeros(3, topology.num_slots, dtype=torch.float64)
    for layer, row in enumerate(placement.physical_to_logical.tolist()):
        for expert in range(logical):
            slots = [slot for slot, held in enumerate(row) if held == expert]
            for rank in range(topology.num_ranks):
                own = [slot for slot in slots if homes[slot] == rank]
                node = [slot for slot in slots if homes[slot] // per_node == rank // per_node]
                chosen = own[:1] or (node[:1] if len(node) < len(slots) else []) or slots
                for slot in chosen:
                    expected[layer, slot] += 1 / len(chosen) / topology.num_ranks
    assert (nearest_shares(placement, topology) - expected).abs().max() < 1e-12


def test_balanced_shares_are_those_of_the_split():
    topology, logical = TOPOLOGIES[0]
    placement = random_placement(topology, logical, 0)
    counts = (lognormal(3, logical, 1.0) / 1e4).long() * torch.tensor([1, 2, 0])[:, None, None]
    shares = balanced_shares(counts, placement, topology, 2)
    tokens = eplb.balance_batch(counts, placement, topology, expert_cost=2)
    by_rank = topology.by_rank(tokens.double(), 0.0).sum(3).sum(0)
    assert torch.allclose(rank_loads(counts.sum(0), placement, topology, shares)[0], by_rank)
    nothing = balanced_shares(counts[2:], placement, topology, 0)
    assert torch.equal(nothing, even_shares(placement))


def test_rank_loads_by_shares():
    topology = eplb.Topology(num_ranks=2, num_slots=4)
    placement = eplb.Placement(torch.tensor([[0, 1, 2, 0]]), 3)
    load = torch.tensor([[8.0, 2.0, 4.0]])
    shares = torch.tensor([[0.25, 1.0, 1.0, 0.75]], dtype=torch.float64)
    assert rank_loads(load, placement, topology, shares).tolist() == [[[4.0, 10.0]]]
    assert balancedness(load, placement, topology, shares) == 7 / 10
    even = rank_loads(load, placement, topology, even_shares(placement))
    assert torch.equal(even, rank_loads(load, placement, topology))
    empty = eplb.Placement(torch.tensor([[0, 1, 2, -1]]), 3)
    assert even_shares(empty).tolist() == [[1, 1, 1, 0]]
    assert rank_loads(load, empty, topology, even_shares(empty)).tolist() == [[[10.0, 4.0]]]
    with pytest.raises(PlacementError, match=r"shares are \(1, 3\), layers and slots \(1, 4\)"):
        rank_loads(load, placement, topology, shares[:, :3])
    with pytest.raises(PlacementError, match="empty slots"):
        nearest_shares(empty, topology)
