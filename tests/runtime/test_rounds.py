"""Rounds keep to their limits, and messages carry every byte of an expert once."""

from __future__ import annotations

from collections import defaultdict

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eplb_plugin.runtime.weights.migration import Sends
from eplb_plugin.runtime.weights.rounds import RoundLimits, coalesce, plan_rounds, split


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 3)), max_size=40),
    st.none() | st.integers(1, 50),
    st.none() | st.integers(1, 9),
)
def test_no_rank_sends_or_receives_more_than_the_limits_of_a_round(
    triples: list[tuple[int, int, int]], num_bytes: int | None, messages: int | None
) -> None:
    sizes = [(3, 1), (10, 4), (25, 2)]
    layer, source, rank = torch.tensor(sorted(triples), dtype=torch.int64).view(-1, 3).unbind(1)
    sends = Sends(layer=layer, expert=layer, source_rank=source, source_slot=source, rank=rank)
    limits = RoundLimits(num_bytes, messages)
    rounds = plan_rounds(sends, 4, sizes, limits)
    assert rounds == sorted(rounds)
    assert set(rounds) == set(range(max(rounds, default=-1) + 1))
    for size, most in enumerate(limits):
        if most is None:
            continue
        for number in set(rounds):
            for ends in (source, rank):
                for end in range(4):
                    there = [
                        sizes[int(layer[at])][size]
                        for at, other in enumerate(rounds)
                        if other == number and int(ends[at]) == end
                    ]
                    assert sum(there) <= most or len(there) == 1
    assert plan_rounds(sends, 4, sizes, RoundLimits()) == [0] * len(triples)


@given(st.lists(st.integers(1, 50), max_size=5), st.none() | st.integers(1, 60))
def test_chunks_are_all_of_an_expert_once(sizes: list[int], most: int | None) -> None:
    parts: dict[int, int] = defaultdict(int)
    covered: list[tuple[int, int]] = []
    for part, row, first, end in split(sizes, most):
        parts[part] += end - first
        covered += [(row, byte) for byte in range(first, end)]
        assert most is None or end - first <= most
    assert covered == [(row, byte) for row, size in enumerate(sizes) for byte in range(size)]
    assert most is None or all(num_bytes < 2 * most for num_bytes in parts.values())
    assert most is not None or set(parts) <= {0}


@given(st.lists(st.integers(1, 3 << 20), max_size=40))
def test_coalesced_messages_have_every_row_once_and_about_equal_bytes(sizes: list[int]) -> None:
    runs = list(coalesce(sizes))
    assert [row for run in runs for row in range(run.start, run.stop)] == list(range(len(sizes)))
    assert all(sum(sizes[run]) <= (3 << 20) + max(sizes) for run in runs)
