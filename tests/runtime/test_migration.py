"""The migration plan carried out by hand, and its senders against a slow loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eplb_plugin as eplb
from eplb_plugin.runtime.weights.migration import MigrationPlan, plan_migration
from tests.runtime.cases import random_placement


@st.composite
def migrations(draw) -> tuple[eplb.Placement, eplb.Placement, eplb.Topology]:
    nodes, per_node, per_rank = (draw(st.integers(1, n)) for n in (3, 3, 5))
    slots = nodes * per_node * per_rank
    topology = eplb.Topology(num_nodes=nodes, num_ranks=nodes * per_node, num_slots=slots)
    logical, layers, seed = draw(st.integers(1, slots)), draw(st.integers(1, 3)), draw(st.integers(0, 2**31))
    old, new = (random_placement(layers, logical, slots, seed + i) for i in (0, 1))
    if draw(st.booleans()):  # mostly alike, as in practice
        rows = old.physical_to_logical.clone()
        a, b = (draw(st.integers(0, slots - 1)) for _ in range(2))
        rows[:, [a, b]] = rows[:, [b, a]]
        new = eplb.Placement(rows, logical)
    return old, new, topology


def carry_out(plan: MigrationPlan, old: eplb.Placement, topology: eplb.Topology) -> list[list[int]]:
    """The experts in all slots after the plan, step by step as `execute` orders them."""
    slots = old.physical_to_logical.tolist()
    before = old.physical_to_logical.tolist()
    written: set[tuple[int, int]] = set()

    def write(layer: int, slot: int, expert: int) -> None:
        assert (layer, slot) not in written
        written.add((layer, slot))
        slots[layer][slot] = expert

    sends, copies = plan.sends, plan.copies
    per_rank = topology.slots_per_rank
    sent = []
    for layer, expert, source_rank, source, rank in zip(
        sends.layer.tolist(),
        sends.expert.tolist(),
        sends.source_rank.tolist(),
        sends.source_slot.tolist(),
        sends.rank.tolist(),
        strict=True,
    ):
        assert before[layer][source] == expert
        assert source // per_rank == source_rank != rank
        assert expert not in before[layer][rank * per_rank : (rank + 1) * per_rank]
        sent.append((layer, rank, expert))
    assert len(set(sent)) == len(sent)  # once per receiving rank

    for send, slot in zip(plan.arrivals.send.tolist(), plan.arrivals.slot.tolist(), strict=True):
        layer, rank, expert = sent[send]
        assert slot // per_rank == rank
        write(layer, slot, expert)
    assert set(plan.arrivals.send.tolist()) == set(range(len(sent)))
    for layer, rank, source, slot, staged in zip(
        copies.layer.tolist(),
        copies.rank.tolist(),
        copies.source_slot.tolist(),
        copies.slot.tolist(),
        copies.staged.tolist(),
        strict=True,
    ):
        assert source // per_rank == slot // per_rank == rank
        # A direct copy reads in the middle of the writes, a staged one before all of them.
        write(layer, slot, before[layer][source] if staged else slots[layer][source])
    for layer, source, staged in zip(
        copies.layer.tolist(), copies.source_slot.tolist(), copies.staged.tolist(), strict=True
    ):
        assert staged == ((layer, source) in written)
    return slots


def slow_senders(plan: MigrationPlan, old: eplb.Placement, topology: eplb.Topology) -> list[int]:
    """The source slot of every send by the rule in words: near ones, then the least busy of the layer."""
    spr, ranks = topology.slots_per_rank, topology.num_ranks
    sends = list(
        zip(plan.sends.layer.tolist(), plan.sends.expert.tolist(), plan.sends.rank.tolist(), strict=True)
    )
    choices = []
    for layer, expert, rank in sends:
        holders = [s for s, e in enumerate(old.physical_to_logical[layer].tolist()) if e == expert]
        near = [s for s in holders if s // topology.slots_per_node == rank // topology.ranks_per_node]
        choices.append(near or holders)
    busy = [[0] * ranks for _ in range(old.num_layers)]
    chosen = [0] * len(sends)
    for index in sorted(range(len(sends)), key=lambda i: (sends[i][0], len(choices[i]))):
        layer = sends[index][0]
        chosen[index] = min(
            choices[index], key=lambda s: (busy[layer][s // spr], (s // spr - layer) % ranks, s)
        )
        busy[layer][chosen[index] // spr] += 1
    return chosen


@settings(max_examples=200, deadline=None)
@given(migrations())
def test_it_leads_from_the_old_placement_to_the_new_one(case) -> None:
    old, new, topology = case
    plan = plan_migration(old, new, topology)
    assert carry_out(plan, old, topology) == new.physical_to_logical.tolist()
    moves = eplb.count_moves(old, new, topology)
    assert torch.equal(torch.bincount(plan.sends.layer, minlength=old.num_layers), moves)
    changed = (old.physical_to_logical != new.physical_to_logical).any(1)
    assert plan.layers.tolist() == changed.nonzero().flatten().tolist()


@settings(max_examples=200, deadline=None)
@given(migrations())
def test_senders_are_near_and_balanced(case) -> None:
    old, new, topology = case
    plan = plan_migration(old, new, topology)
    assert plan.sends.source_slot.tolist() == slow_senders(plan, old, topology)


def test_no_change_needs_nothing() -> None:
    placement = random_placement(3, 6, 8, seed=1)
    plan = plan_migration(placement, placement, eplb.Topology(num_ranks=4, num_slots=8))
    assert (
        plan.num_sends == plan.layers.numel() == plan.copies.slot.numel() == plan.arrivals.slot.numel() == 0
    )


def test_replicas_share_the_sending() -> None:
    # Expert 0 is on ranks 0 and 1; ranks 2 and 3 want it.
    old = eplb.Placement(torch.tensor([[0, 1, 0, 2, 3, 4, 5, 6]]), 7)
    new = eplb.Placement(torch.tensor([[6, 1, 3, 2, 0, 4, 5, 0]]), 7)
    plan = plan_migration(old, new, eplb.Topology(num_ranks=4, num_slots=8))
    of_zero = plan.sends.source_rank[plan.sends.expert == 0]
    assert sorted(of_zero.tolist()) == [0, 1]


def test_placements_that_do_not_fit_are_refused() -> None:
    topology = eplb.Topology(num_ranks=2, num_slots=4)
    with pytest.raises(eplb.PlacementError, match="cannot migrate"):
        plan_migration(random_placement(1, 3, 4, 0), random_placement(2, 3, 4, 0), topology)
    with pytest.raises(eplb.PlacementError, match="cannot migrate"):
        plan_migration(random_placement(1, 3, 6, 0), random_placement(1, 3, 6, 1), topology)
