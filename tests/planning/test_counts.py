"""Replica counts and LPT packings, from heaps, against scans as oracles."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_plugin.planning.kernels.lpt_packing import pack_lpt
from eplb_plugin.planning.kernels.replica_counts import apply_counts, greedy_counts
from eplb_plugin.planning.kernels.single_load_counts import isolating_counts


@st.composite
def problems(draw):
    """Loads with many ties, experts on nodes, and slots."""
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    nodes, ranks_per_node, members = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 8))
    total = np.round(rng.lognormal(1, 1, nodes * members))
    node = rng.permutation(np.arange(nodes * members) // members)
    capacity = -(-members // ranks_per_node) + draw(st.integers(0, 2))
    in_force = rng.integers(0, 4, nodes * members)
    return total, node, in_force, nodes * ranks_per_node * capacity, nodes * ranks_per_node, ranks_per_node


def scanned_counts(total, node, in_force, bonus, num_slots, num_ranks, ranks_per_node):
    count = np.ones(len(total), np.int64)
    for here in set(node.tolist()):
        members = [e for e in range(len(total)) if node[e] == here]
        slots = num_slots // (num_ranks // ranks_per_node)
        most = max(ranks_per_node, -(-slots // len(members)))
        for _ in range(slots - len(members)):
            open_ = [e for e in members if count[e] < most]
            # max() takes the first of equals.
            heaviest = max(
                open_, key=lambda e: total[e] / count[e] * (bonus if count[e] < in_force[e] else 1)
            )
            count[heaviest] += 1
    return count


def scanned_packing(total, count, node, num_slots, num_ranks, ranks_per_node):
    capacity = num_slots // num_ranks
    ranks = [[] for _ in range(num_ranks)]
    load = np.zeros(num_ranks)
    for expert in np.argsort(-total / count, kind="stable").tolist():
        for _ in range(count[expert]):
            first = node[expert] * ranks_per_node
            room = [r for r in range(first, first + ranks_per_node) if len(ranks[r]) < capacity]
            lacks = [r for r in room if expert not in ranks[r]] or room
            lightest = min(lacks, key=load.__getitem__)
            ranks[lightest].append(expert)
            load[lightest] += total[expert] / count[expert]
    return np.array(ranks).ravel()


@given(problems(), st.sampled_from([1.0, 1.2]))
@settings(max_examples=100, deadline=None)
def test_heaps_choose_what_scans_choose(problem, bonus):
    total, node, in_force, *sizes = problem
    count = greedy_counts(total, node, in_force, bonus, *sizes)
    assert count.tolist() == scanned_counts(total, node, in_force, bonus, *sizes).tolist()
    packed = np.empty(sizes[0], np.int64)
    room = np.full(sizes[1], sizes[0] // sizes[1])
    pack_lpt(total, count, node, sizes[2], room, 0, 0, packed)
    assert packed.tolist() == scanned_packing(total, count, node, *sizes).tolist()


@given(problems(), st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_new_counts_are_reached_and_nothing_else_moves(problem, seed):
    total, node, _, num_slots, *sizes = problem
    ones = np.ones(len(total), np.int64)
    count = greedy_counts(total, node, ones, 1.0, num_slots, *sizes)
    before = np.empty(num_slots, np.int64)
    pack_lpt(total, count, node, sizes[1], np.full(sizes[0], num_slots // sizes[0]), 0, 0, before)
    other = np.random.default_rng(seed).lognormal(1, 1, len(total))
    target = greedy_counts(other, node, count, 1.2, num_slots, *sizes)
    after = before.copy()
    apply_counts(other, count, target, node, after, *sizes)
    assert np.bincount(after, minlength=len(total)).tolist() == target.tolist()
    # One slot for each replica that arrives, and one more where an expert makes room for it.
    arriving = np.maximum(target - count, 0).sum()
    assert arriving <= (before != after).sum() <= 2 * arriving
    per_node = num_slots // (sizes[0] // sizes[1])
    assert (node[after] == np.arange(num_slots) // per_node).all()


@given(
    st.integers(0, 2**20),
    st.integers(2, 6),
    st.integers(0, 20),
    st.integers(1, 6),
    st.integers(0, 2),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_isolated_hot_experts_have_one_replica_for_each_rank_together(
    seed, ranks, spare, hot, without, to_lightest
):
    rng = np.random.default_rng(seed)
    total = np.round(rng.lognormal(1, 1.5, hot + int(rng.integers(1, 8))))
    theirs = max(1, ranks - without)
    hot = min(hot, theirs)
    order = np.argsort(-total, kind="mergesort")
    slots = min(len(total) + spare, ranks + (len(total) - hot) * ranks)
    count = isolating_counts(total, order, hot, slots, ranks, theirs, to_lightest)
    assert count.sum() == slots
    assert count.max() <= max(ranks, -(-slots // (len(total) - hot)))
    first, rest = order[:hot], order[hot:]
    assert count[first].sum() == min(theirs, slots - len(rest))
    if to_lightest:
        # One more for each, the lightest first, and then one more again.
        assert np.all(np.diff(count[rest]) >= 0)
        assert count[rest].max() - count[rest].min() <= 1
    # Each part is replicated as if it were alone.
    for part in (np.sort(first), *([] if to_lightest else [np.sort(rest)])):
        one = np.zeros(len(part), np.int64)
        assert (
            count[part].tolist()
            == scanned_counts(total[part], one, one, 1.0, count[part].sum(), ranks, ranks).tolist()
        )
