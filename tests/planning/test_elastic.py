"""Ranks that fail and join: what is lost, what stays, what it costs, how near a plan from scratch it is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import eplb_plugin as eplb
from eplb_plugin.planning import planner
from eplb_plugin.planning.anti_affinity import shared_replicas
from eplb_plugin.planning.elastic import complete, missing_experts
from eplb_plugin.planning.hierarchy import groups_within_nodes
from eplb_plugin.planning.policies import POLICIES
from tests.planning.elastic_cases import check_plan, random_load, random_table

NOTHING_PAYS = eplb.PlannerOptions(min_gain=0.99)
FEW_CANDIDATES = eplb.EnsembleOptions(num_candidates=4)


@st.composite
def failures(draw) -> tuple[eplb.Topology, int, list[bool], torch.Tensor, int]:
    """A topology, experts, which ranks are alive, what is held, and a seed."""
    nodes, per_node = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    ranks = nodes * per_node
    alive = draw(st.lists(st.booleans(), min_size=ranks, max_size=ranks))
    alive[draw(st.integers(0, ranks - 1))] = True
    groups = draw(st.sampled_from([1, nodes, 2 * nodes]))
    experts = groups * draw(st.integers(1, 5))
    per_rank = -(-experts // sum(alive)) + draw(st.integers(0, 3))
    topology = eplb.Topology(num_nodes=nodes, num_ranks=ranks, num_slots=ranks * per_rank, num_groups=groups)
    seed = draw(st.integers(0, 2**20))
    if draw(st.booleans()):
        # All ranks were alive, or one node alone where it can hold everything.
        stood_in = draw(st.booleans()) and per_node * per_rank >= experts
        before = [not stood_in or rank < per_node for rank in range(ranks)]
        load = random_load(2, experts, seed=seed)
        current = eplb.plan(load, topology, None, NOTHING_PAYS, active_ranks=before)
        table = current.placement.physical_to_logical
    else:
        empty = draw(st.sampled_from([0.0, 0.3, 1.0]))
        table = random_table(2, experts, topology.num_slots, empty, seed)
    return topology, experts, alive, table, seed


@given(failures(), st.integers(1, 3), st.sampled_from(["adaptive", "ensemble", "greedy"]), st.booleans())
@settings(max_examples=50, deadline=None)
def test_rules_hold_whoever_fails(case, snapshots, policy, priced):
    topology, experts, alive, table, seed = case
    load = random_load(snapshots, 2, experts, seed=seed + 1)
    options = eplb.PlannerOptions(policy=policy, move_price=0.0025 if priced else 0, ensemble=FEW_CANDIDATES)
    check_plan(load, topology, eplb.plan(load, topology, table, options, active_ranks=alive), table, alive)
    check_plan(load, topology, eplb.plan(load, topology, None, options, active_ranks=alive), None, alive)


@given(failures())
@settings(max_examples=50, deadline=None)
def test_completing_changes_no_more_slots_than_it_has_to(case):
    _, experts, _, table, seed = case
    topology = eplb.Topology(num_ranks=1, num_slots=table.shape[1])
    load = random_load(3, 2, experts, seed=seed + 1).double()
    done = complete(table, load, topology)
    assert missing_experts(done, experts) == ()
    for layer, (before, after) in enumerate(zip(table, done, strict=True)):
        missing = [e for at, e in missing_experts(table, experts) if at == layer]
        assert int((before != after).sum()) == max(len(missing), int((before < 0).sum()))


@given(failures(), st.integers(1, 3))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_exchanges_beyond_a_plain_fill_pay(case, snapshots):
    topology, experts, alive, table, seed = case
    # Without the hierarchical policy, which plans anew what breaks it.
    topology = eplb.Topology(num_ranks=topology.num_ranks, num_slots=topology.num_slots)
    load = random_load(snapshots, 2, experts, seed=seed + 1)
    compact = eplb.Topology(num_ranks=sum(alive), num_slots=sum(alive) * topology.slots_per_rank)
    slots = torch.tensor(alive).repeat_interleave(topology.slots_per_rank)
    plain = complete(table[:, slots], load.double(), compact)
    assume(not shared_replicas(plain, compact).any())  # those are parted whatever that takes
    # For the snapshots as they are, since what is expected next may have its peak elsewhere.
    as_seen = {"snapshot_decay": 1.0, "persistence": 0.0}
    filled, planned, bounded = (
        eplb.plan(load, topology, table, options.model_copy(update=as_seen), active_ranks=alive)
        for options in (NOTHING_PAYS, eplb.PlannerOptions(), eplb.PlannerOptions(max_moves=0))
    )
    peaks = [eplb.rank_loads(load, x.placement, topology).amax(2).sum(0) for x in (filled, planned)]
    assert (peaks[1] <= peaks[0] * (1 + 1e-6)).all()
    assert bounded.moves <= filled.moves


@pytest.mark.parametrize(
    ("experts", "per_rank", "ranks", "dead"),
    [(64, 12, 8, [2]), (64, 16, 8, [2, 7]), (64, 32, 8, [0, 2, 4, 6]), (128, 10, 16, [5])],
)
def test_balance_after_a_failure_is_near_that_of_a_plan_from_scratch(experts, per_rank, ranks, dead):
    topology = eplb.Topology(num_ranks=ranks, num_slots=ranks * per_rank)
    drift = random_load(8, 6, experts, seed=1, sigma=0.2)
    load = random_load(1, 6, experts, sigma=0.8) * drift
    before = eplb.plan(load, topology).placement
    alive = [rank not in dead for rank in range(ranks)]
    planned = eplb.plan(load, topology, before, active_ranks=alive)
    check_plan(load, topology, planned, before.physical_to_logical, alive)
    compact = eplb.Topology(num_ranks=sum(alive), num_slots=sum(alive) * per_rank)
    assert planned.balancedness >= eplb.plan(load, compact).balancedness - 0.025


@pytest.mark.parametrize(("experts", "per_rank", "old", "new"), [(64, 20, 4, 6), (128, 10, 15, 16)])
def test_balance_after_joining_is_near_that_of_a_plan_from_scratch(experts, per_rank, old, new):
    load = random_load(1, 6, experts, sigma=0.8) * random_load(8, 6, experts, seed=1, sigma=0.2)
    before = eplb.plan(load, eplb.Topology(num_ranks=old, num_slots=old * per_rank)).placement
    topology = eplb.Topology(num_ranks=new, num_slots=new * per_rank)
    table = torch.nn.functional.pad(before.physical_to_logical, (0, (new - old) * per_rank), value=-1)
    planned = eplb.plan(load, topology, table)
    check_plan(load, topology, planned, table)
    assert planned.lost == ()
    assert planned.balancedness >= eplb.plan(load, topology).balancedness - 0.025
    assert planned.moves <= 3 * 6 * (new - old) * per_rank


def test_failures_one_after_the_other_and_back_again():
    experts, topology = 24, eplb.Topology(num_ranks=8, num_slots=8 * 24)
    load = random_load(4, 3, experts)
    current = eplb.plan(load, topology).placement
    alive = [True] * 8
    for rank in (3, 0, 7, 5, 6, 1, 2):
        alive[rank] = False
        planned = eplb.plan(load, topology, current, active_ranks=alive)
        check_plan(load, topology, planned, current.physical_to_logical, alive)
        current = planned.placement
    # One rank is left, which holds each expert once.
    assert torch.equal(current.physical_to_logical[:, 96:120].sort(1).values[0], torch.arange(24))
    assert planned.balancedness == 1
    for rank in (0, 1, 2):
        alive[rank] = True
        planned = eplb.plan(load, topology, current, active_ranks=torch.tensor(alive))
        check_plan(load, topology, planned, current.physical_to_logical, alive)
        assert planned.lost == ()
        current = planned.placement
    planned = eplb.plan(load, topology, current)
    check_plan(load, topology, planned, current.physical_to_logical)
    assert not planned.placement.has_empty_slots


def test_lost_experts_are_named_and_the_rest_stays():
    topology = eplb.Topology(num_ranks=3, num_slots=9)
    table = torch.tensor([[0, 1, 2, 3, 4, 0, 5, 1, 2], [0, 1, 2, 3, 4, 5, 0, 1, 2]])
    load = torch.ones(2, 6)
    planned = eplb.plan(load, topology, table, NOTHING_PAYS, active_ranks=[True, False, True])
    assert planned.lost == ((0, 3), (0, 4), (1, 3), (1, 4), (1, 5))
    rows = planned.placement.physical_to_logical
    # Layer 0 spares a replica of 1 and one of 2; layer 1 one of each.
    assert (rows[:, 3:6] == -1).all()
    assert set(rows[0].tolist()) == set(range(-1, 6))
    assert int((rows[0] != table[0]).sum()) == 3 + 2
    assert int((rows[1] != table[1]).sum()) == 3 + 3


def test_a_surplus_replica_goes_where_it_is_missed_least():
    topology = eplb.Topology(num_ranks=2, num_slots=6)
    table = torch.tensor([[0, 1, 2, 0, 1, 2]])
    # Expert 3 is lost: 1 is the lightest of those that have a replica to spare.
    load = torch.tensor([[90.0, 10.0, 60.0, 30.0]])
    done = complete(table, load[None].double(), topology)
    assert sorted(done[0].tolist()) == [0, 0, 1, 2, 2, 3]


def test_without_current_nothing_is_lost():
    topology = eplb.Topology(num_ranks=4, num_slots=16)
    load = random_load(2, 8)
    planned = eplb.plan(load, topology, active_ranks=[True, True, False, True])
    check_plan(load, topology, planned, None, [True, True, False, True])
    compact = eplb.plan(load, eplb.Topology(num_ranks=3, num_slots=12))
    rows = planned.placement.physical_to_logical
    assert torch.equal(rows[rows >= 0].view(2, 12), compact.placement.physical_to_logical)
    assert planned.balancedness == compact.balancedness


def test_a_mask_of_all_ranks_changes_nothing():
    topology = eplb.Topology(num_ranks=4, num_slots=16)
    load = random_load(4, 2, 8)
    first = eplb.plan(load.sum(0), topology).placement
    plain, masked = (eplb.plan(load, topology, first, active_ranks=x) for x in (None, [True] * 4))
    assert plain.placement == masked.placement
    assert plain.moves == masked.moves


def test_nodes_that_stay_alike_keep_their_groups(caplog, monkeypatch):
    monkeypatch.setattr(planner, "_warned", set())
    topology = eplb.Topology(num_nodes=2, num_ranks=8, num_slots=48, num_groups=4)
    load = random_load(2, 16)
    first = eplb.plan(load, topology)
    alike = [True, False, True, True, True, True, True, False]
    with caplog.at_level("INFO", "eplb_plugin"):
        planned = eplb.plan(load, topology, first.placement, active_ranks=alike)
    assert planned.hierarchical
    assert not caplog.records
    check_plan(load, topology, planned, first.placement.physical_to_logical, alike)
    for row in planned.placement.physical_to_logical:
        nodes = [{e // 4 for e in half.tolist() if e >= 0} for half in row.view(2, 24)]
        assert not nodes[0] & nodes[1]

    unlike = [True, False, True, True, True, True, True, True]
    with caplog.at_level("INFO", "eplb_plugin"):
        for _ in range(2):
            before = planned.placement
            planned = eplb.plan(load, topology, before, active_ranks=unlike)
            check_plan(load, topology, planned, before.physical_to_logical, unlike)
    assert not planned.hierarchical
    assert [record.getMessage() for record in caplog.records] == [
        "planning globally: the 2 nodes differ in the slots of their living ranks: (6, 0, 6, 6, 6, 6, 6, 6)"
    ]
    # All are back, and so is the policy.
    assert eplb.plan(load, topology, planned.placement).hierarchical


def test_a_group_that_is_lost_goes_to_the_node_with_room():
    topology = eplb.Topology(num_nodes=2, num_ranks=4, num_slots=16, num_groups=4)
    table = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, -1, -1, -1, -1, -1, -1]])
    planned = eplb.plan(torch.ones(1, 8), topology, table)
    assert planned.hierarchical
    assert planned.lost == ((0, 6), (0, 7))
    assert set(planned.placement.physical_to_logical[0, 8:].tolist()) == {4, 5, 6, 7}


@pytest.mark.parametrize(("ranks", "slots", "groups", "experts"), [(2, 8, 2, 4), (16, 384, 8, 160)])
def test_a_node_that_comes_back_gets_its_groups(ranks, slots, groups, experts):
    topology = eplb.Topology(num_nodes=2, num_ranks=ranks, num_slots=slots, num_groups=groups)
    load = random_load(2, experts)
    alive = [rank < ranks // 2 for rank in range(ranks)]
    before = eplb.plan(load, topology, eplb.plan(load, topology).placement, active_ranks=alive).placement
    planned = eplb.plan(load, topology, before)
    assert planned.hierarchical
    assert planned.lost == ()
    check_plan(load, topology, planned, before.physical_to_logical)
    assert groups_within_nodes(planned.placement.physical_to_logical, experts, topology).all()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("zero", [True, False])
def test_every_policy_plans_around_dead_ranks_with_and_without_load(policy, zero):
    options = eplb.PlannerOptions(policy=policy)
    topology = eplb.Topology(num_ranks=4, num_slots=16)
    load = torch.zeros(2, 8) if zero else random_load(2, 8)
    table = random_table(2, 8, 16, 0.4, 0)
    planned = eplb.plan(load, topology, table, options, active_ranks=[True, False, True, True])
    check_plan(load, topology, planned, table, [True, False, True, True])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([True], r"for 1 ranks, num_ranks=4"),
        ([True] * 5, r"for 5 ranks, num_ranks=4"),
        ([1, 1, 1, 1], r"1 for rank 0, not a bool"),
        (torch.ones(4), r"torch.float32 \(4,\), not bool \[4\]"),
        (torch.ones(1, 4, dtype=torch.bool), r"\(1, 4\)"),
        ([False] * 4, "none of 4 ranks"),
        (
            [True, False, False, True],
            "num_logical=9 experts .* the 8 slots of the 2 living ranks of 4",
        ),
    ],
)
def test_bad_masks_name_the_numbers(mask, message):
    topology = eplb.Topology(num_ranks=4, num_slots=16)
    with pytest.raises(eplb.TopologyError, match=message):
        eplb.plan(torch.ones(1, 9), topology, active_ranks=mask)


def test_a_table_in_force_may_lack_experts_only_where_slots_are_empty():
    topology, load = eplb.Topology(num_ranks=2, num_slots=4), torch.ones(1, 3)
    full = torch.tensor([[0, 1, 1, 0]])
    with pytest.raises(eplb.PlacementError, match="no slot for expert 2"):
        eplb.plan(load, topology, full)
    assert eplb.plan(load, topology, full, active_ranks=[True, True]).lost == ((0, 2),)
    assert eplb.plan(load, topology, torch.tensor([[0, 1, 1, -1]])).lost == ((0, 2),)
    with pytest.raises(eplb.PlacementError, match="slot 3 holds expert -2"):
        eplb.plan(load, topology, torch.tensor([[0, 1, 1, -2]]))
    with pytest.raises(eplb.PlacementError, match="slot 2 of rank 1, which active_ranks says is dead"):
        eplb.plan_migration(
            full, eplb.Placement(torch.tensor([[0, 1, 2, -1]]), 3), topology, active_ranks=[True, False]
        )
