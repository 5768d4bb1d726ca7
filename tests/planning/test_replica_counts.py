"""Replica counts by one sort against the rule itself: slot by slot to the largest load per replica."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_plugin.planning.replica_counts import replicate


def one_by_one(weight: list[int], num_slots: int, max_replicas: int) -> list[int]:
    count = [1] * len(weight)
    slots = list(range(len(weight)))
    while len(slots) < num_slots:
        free = [expert for expert in range(len(weight)) if count[expert] < max_replicas]
        hottest = max(free, key=lambda expert: (weight[expert] / count[expert], -expert))
        count[hottest] += 1
        slots.append(hottest)
    return slots


# Few different weights, so that there are many ties.
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=5, max_size=5), min_size=1, max_size=4),
    st.integers(0, 30),
    st.none() | st.integers(1, 9),
)
@settings(max_examples=200, deadline=None)
def test_the_sort_gives_what_the_rule_gives(rows, extra, most):
    slots = 5 + extra
    limit = max(slots if most is None else most, -(-slots // 5))
    given_slots = replicate(torch.tensor(rows, dtype=torch.float64), slots, most)
    assert given_slots.tolist() == [one_by_one(row, slots, limit) for row in rows]
