"""The cells of each expert as linked lists, and the moves that follow from them."""

from __future__ import annotations

from .compiling import _compile_apart


@_compile_apart
def _count_moves(expert, first, next_, rank_of, origin_first, origin_next):
    """Experts on ranks that do not hold them in the placement in force."""
    moves = 0
    for cell in range(expert.shape[0]):
        if expert[cell] >= 0 and _leads(first, next_, rank_of, expert[cell], cell):
            moves += _arrives(origin_first, origin_next, rank_of, expert[cell], rank_of[cell])
    return moves


@_compile_apart
def _arrives(origin_first, origin_next, rank_of, expert, rank):
    """Moves that it takes to bring an expert to a rank: 0 where the placement in force has it there."""
    cell = origin_first[expert]
    while cell >= 0:
        if rank_of[cell] == rank:
            return 0
        cell = origin_next[cell]
    return 1


@_compile_apart
def _leads(first, next_, rank_of, expert, cell):
    """Whether a cell is the first of those on its rank in the list of an expert."""
    other = first[expert]
    while rank_of[other] != rank_of[cell]:
        other = next_[other]
    return other == cell


@_compile_apart
def _mark(cell, next_, rank_of, first, ranks_per_node, usual, change, cost):
    """Set `cost` to `usual` plus `change` on each rank of the node that is in a list of cells."""
    while cell >= 0:
        rank = rank_of[cell] - first
        if 0 <= rank < ranks_per_node:
            for at in range(rank, cost.shape[0], ranks_per_node):
                cost[at] = usual[at] + change
        cell = next_[cell]


@_compile_apart
def _put(expert, first, next_, cell, arrives):
    """Put an expert into a cell, in the place of what is there. What follows from it is not refreshed."""
    old = expert[cell]
    if first[old] == cell:
        first[old] = next_[cell]
    else:
        before = first[old]
        while next_[before] != cell:
            before = next_[before]
        next_[before] = next_[cell]
    expert[cell] = arrives
    next_[cell] = first[arrives]
    first[arrives] = cell
