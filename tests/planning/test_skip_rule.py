"""The skip rule: slots that stay, moves that are counted, layers that are left alone."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eplb_plugin as eplb
from eplb_plugin.planning.elastic import complete_placement
from eplb_plugin.planning.kernels.api import keep_slots
from eplb_plugin.planning.skip_rule import apply_skip_rule


@st.composite
def two_placements(draw):
    ranks, capacity, experts, layers = (draw(st.integers(1, n)) for n in (4, 5, 9, 3))
    rows = st.lists(st.integers(0, experts - 1), min_size=ranks * capacity, max_size=ranks * capacity)
    new, old = (torch.tensor([draw(rows) for _ in range(layers)]) for _ in range(2))
    return ranks, experts, new, old


@settings(deadline=None)  # the first example compiles
@given(two_placements())
def test_ranks_keep_their_experts_in_place(case):
    ranks, experts, new, old = case
    kept, moves, shared, shared_before = keep_slots(
        new, old, eplb.Topology(num_ranks=ranks, num_slots=new.shape[1]), experts
    )
    for layer in range(new.shape[0]):
        expected_moves, repeats = 0, [0, 0]
        for rank, (wanted, had, got) in enumerate(
            zip(*(x[layer].view(ranks, -1).tolist() for x in (new, old, kept)), strict=True)
        ):
            assert sorted(got) == sorted(wanted), rank
            # As many slots as possible stay: each expert in min(wanted, had) of them.
            stay = sum(a == b for a, b in zip(got, had, strict=True))
            assert stay == sum(min(wanted.count(e), had.count(e)) for e in set(wanted))
            expected_moves += len(set(wanted) - set(had))
            repeats = [n + len(x) - len(set(x)) for n, x in zip(repeats, (wanted, had), strict=True)]
        assert int(moves[layer]) == expected_moves
        assert [int(shared[layer]), int(shared_before[layer])] == repeats


def test_a_layer_that_breaks_a_rule_does_not_stay():
    topology = eplb.Topology(num_ranks=2, num_slots=4)
    load = torch.ones(1, 2, 3, dtype=torch.float64)
    # Expert 0 sits twice on rank 0 in layer 0; layer 1 is as good as the plan.
    current = torch.tensor([[0, 0, 1, 2], [0, 1, 0, 2]])
    planned = torch.tensor([[0, 1, 0, 2], [1, 0, 2, 0]])
    kept = apply_skip_rule(load, planned, eplb.Placement(current, 3), topology, 0.9)
    assert kept.physical_to_logical.tolist() == [[0, 1, 0, 2], [0, 1, 0, 2]]
    assert kept.moves == 2
    assert kept.shared_replicas == 0


def test_a_layer_that_stays_is_completed_all_the_same():
    topology = eplb.Topology(num_ranks=2, num_slots=4)
    load = torch.ones(1, 1, 3, dtype=torch.float64)
    held = torch.tensor([[0, 1, 2, -1]])
    current = complete_placement(held, 3, load, topology)
    other = torch.tensor([[2, 1, 0, 1]])
    kept = apply_skip_rule(load, other, current, topology, 0.9)
    assert torch.equal(kept.physical_to_logical, current.physical_to_logical)
    # The empty slot of the second rank gets an expert.
    assert kept.moves == 1
