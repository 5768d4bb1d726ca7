"""Parting replicas that share a rank: every change against all others, and no work where none can go."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eplb_plugin as eplb
from eplb_plugin.core.load import to_exact
from eplb_plugin.planning import anti_affinity
from eplb_plugin.planning.anti_affinity import (
    exchange_repeats,
    replace_repeats,
    set_replicas_apart,
    shared_replicas,
)
from eplb_plugin.planning.replica_counts import count_replicas


@st.composite
def cases(draw):
    """A topology, a placement of two layers that repeats experts on ranks, and an exact load."""
    nodes = draw(st.integers(1, 2))
    rank_slots = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    size = draw(st.integers(1, sum(rank_slots)))  # experts of a node
    topology = eplb.Topology(
        num_nodes=nodes,
        num_ranks=nodes * len(rank_slots),
        num_slots=nodes * sum(rank_slots),
        num_groups=nodes,
        rank_slots=tuple(rank_slots * nodes),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    rows = []
    for node in [*range(nodes)] * 2:
        more = torch.randint(size, (sum(rank_slots) - size,), generator=generator)
        order = torch.randperm(sum(rank_slots), generator=generator)
        rows.append(torch.cat([torch.arange(size), more])[order] + node * size)
    load = torch.empty(draw(st.integers(1, 3)), 2, nodes * size, dtype=torch.float64)
    load = load.log_normal_(0, draw(st.sampled_from([0.1, 1.5])), generator=generator)
    return topology, torch.cat(rows).view(2, -1), to_exact(load)


def peak_of(load: torch.Tensor, row: torch.Tensor, topology: eplb.Topology) -> float:
    """Of one layer: the sum over the snapshots of the peak rank load."""
    placement = eplb.Placement(row[None], load.shape[-1])
    return float(eplb.rank_loads(load[:, None], placement, topology).amax(2).sum())


def experts_by_rank(row: torch.Tensor, topology: eplb.Topology) -> list[set[int]]:
    return [set(row[topology.slots_of_rank(rank)].tolist()) for rank in range(topology.num_ranks)]


@given(cases())
@settings(max_examples=60, deadline=None)
def test_a_repeat_is_replaced_by_what_leaves_the_lowest_peak(case):
    topology, ids, load = case
    replaced = replace_repeats(ids, load, topology)
    size = load.shape[2] // topology.num_nodes
    for layer, row in enumerate(ids.clone()):
        limit = 1.01 * peak_of(load[:, layer], row, topology)
        for slot in shared_replicas(ids, topology)[layer].nonzero()[:, 0].tolist():
            rank = int(topology.rank_of_slot()[slot])
            node = rank // topology.ranks_per_node
            choice = set(range(node * size, node * size + size)) - experts_by_rank(row, topology)[rank]
            peaks = {}
            for expert in choice:
                changed = row.clone()
                changed[slot] = expert
                peaks[expert] = peak_of(load[:, layer], changed, topology)
            lowest = min(peaks.values(), default=float("inf"))
            taken = int(replaced[layer, slot])
            if taken == row[slot]:
                assert lowest > limit * (1 - 1e-9)
            else:
                assert peaks[taken] <= min(limit, lowest) * (1 + 1e-9)
            row[slot] = taken
        assert torch.equal(row, replaced[layer])


@given(cases())
@settings(max_examples=60, deadline=None)
def test_exchanges_part_replicas_as_long_as_one_is_cheap_enough(case):
    topology, ids, load = case
    spread = exchange_repeats(ids, load / count_replicas(ids, load.shape[2]), topology)
    for layer, (before, after) in enumerate(zip(ids, spread, strict=True)):
        limit = 1.01 * peak_of(load[:, layer], before, topology)
        assert torch.equal(before.sort().values, after.sort().values)
        assert peak_of(load[:, layer], after, topology) <= limit * (1 + 1e-9)
        ranks = experts_by_rank(after, topology)
        for slot in shared_replicas(after[None], topology)[0].nonzero()[:, 0].tolist():
            here = int(topology.rank_of_slot()[slot])
            for other in range(topology.num_slots):
                there = int(topology.rank_of_slot()[other])
                same_node = here // topology.ranks_per_node == there // topology.ranks_per_node
                if not same_node or int(after[other]) in ranks[here] or int(after[slot]) in ranks[there]:
                    continue
                changed = after.clone()
                changed[slot], changed[other] = after[other], after[slot]
                assert peak_of(load[:, layer], changed, topology) > limit * (1 - 1e-9)


def test_nothing_is_tried_where_ranks_hold_every_expert(monkeypatch):
    tried = []
    monkeypatch.setattr(anti_affinity, "_best_exchange", lambda *_: tried.append(1))
    topology = eplb.Topology(num_ranks=4, num_slots=4 * 32)
    ids = (torch.arange(4 * 32) % 8).expand(3, -1)
    # Rank 3 of the last layer lacks expert 7, which it could have for itself alone.
    ids = ids.clone()
    ids[2, 96:] %= 7
    load = torch.ones(1, 3, 8, dtype=torch.float64)
    assert torch.equal(exchange_repeats(ids, load / count_replicas(ids, 8), topology), ids)
    assert not tried
    assert torch.equal(replace_repeats(ids, load, topology)[:2], ids[:2])


@pytest.mark.parametrize(("bound", "repeats"), [(None, 0), (1, 0), (0, 1)])
def test_an_expert_that_every_rank_has_gives_its_second_slot_to_another(bound, repeats):
    topology = eplb.Topology(num_ranks=2, num_slots=6)
    ids = torch.tensor([[0, 0, 1, 0, 2, 3]])
    load = torch.tensor([[[3.0, 1.0, 1.0, 1.0]]], dtype=torch.float64)
    parted = set_replicas_apart(ids, load, topology, ids, bound)
    assert int(shared_replicas(parted, topology).sum()) == repeats
    assert peak_of(load[:, 0], parted[0], topology) == 3
