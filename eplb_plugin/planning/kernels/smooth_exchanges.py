"""Making an exchange: what is where, and all that depends on it."""

from __future__ import annotations

from .cells import _put
from .compiling import _compile_apart
from .smooth_state import _refresh_rank


@_compile_apart
def _make_swap(state, mine, other, capacity, ranks_per_node):
    expert, rank_of = state.expert, state.rank_of
    x, y = expert[mine], expert[other]
    for cell, arrives in ((mine, y), (other, x)):
        _put(expert, state.first, state.next_, cell, arrives)
    for cell in (mine, other):
        _refresh_rank(state, rank_of[cell], capacity, ranks_per_node)


@_compile_apart
def _make_change(state, expert, cell, capacity, ranks_per_node):
    count, first, next_, rank_of = state.replicas, state.first, state.next_, state.rank_of
    old = state.expert[cell]
    count[old] -= 1
    count[expert] += 1
    _put(state.expert, first, next_, cell, expert)
    for changed in (old, expert):
        holder = first[changed]
        while holder >= 0:
            _refresh_rank(state, rank_of[holder], capacity, ranks_per_node)
            holder = next_[holder]
