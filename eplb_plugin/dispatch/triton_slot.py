"""Triton: from the experts of a batch's tokens to their slots, in three launches, equal to `split_kernels`.

1. `count`: tokens of each expert, by blocks of ids; beside that, the tasks of the ranks.
2. `split`: quotas of all slots; beside that, the position of each id among those of its expert.
3. `assign`: the slot of each id.

What is beside is done by other programs of the same launch, in the time that it takes anyway.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_split import split_batch
from .triton_tables import GIVEN, NUM_LISTS, list_tasks

__all__ = ["BLOCK", "CHUNK", "GIVEN", "NUM_LISTS", "PART", "assign", "count", "split"]

BLOCK = tl.constexpr(256)
"""Ids whose experts are counted together."""
CHUNK = tl.constexpr(64)
"""Ids whose positions one program finds. It compares each of them with the earlier ones of their block."""
PART = tl.constexpr(32)
"""Experts whose counts one program sums over the blocks."""
REPLICAS = tl.constexpr(8)
"""Replicas of each id's expert that are loaded at once."""

# One compiled kernel serves batches of all sizes, and layers wherever their tables begin.
VARIES = (
    "ids", "num_tokens", "slots", "first", "counts",
    "top_k", "num_ids", "num_blocks", "blocks_each", "num_rows", "rank",
)  # fmt: skip


@triton.jit
def _counted(num_tokens, top_k, num_ids, PADDED: tl.constexpr):
    """How many ids are counted; those behind are padding."""
    counted = num_ids
    if PADDED:
        counted = tl.minimum(tl.load(num_tokens).to(tl.int64) * top_k, num_ids).to(tl.int32)
    return counted


@triton.jit
def _experts_of(ids, at, end, NUM_LOGICAL: tl.constexpr):
    """int32: the experts of the ids at `at`; -1 from `end` on and for what is no expert."""
    found = tl.load(ids + at, mask=at < end, other=-1)
    return tl.where((found >= 0) & (found < NUM_LOGICAL), found, -1).to(tl.int32)


@triton.jit(do_not_specialize=VARIES)
def count(
    ids,
    num_tokens,
    slots,
    first,
    counts,
    rank_of_slot,
    first_slot,
    slots_of_rank,
    lists,
    block_counts,
    sums,
    top_k,
    num_ids,
    num_blocks,
    blocks_each,
    NUM_LOGICAL: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    MOST_SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
    PADDED: tl.constexpr,
    GATHERED: tl.constexpr,
):
    """Program 0 lists the tasks, see `list_tasks`. Each other one counts the experts of `blocks_each` blocks.

    Args:
        ids: integer [num_ids], experts; what is none is not counted.
        num_tokens: integer [1], if PADDED: tokens of `top_k` ids each, before padding.
        block_counts: int32 [num_blocks, logical]; written: ids of each expert in each block.
        sums: written. GATHERED: integer [logical], zeros, ids of each expert; else int32 [programs, logical],
            those of each program.
    """
    program = tl.program_id(0)
    if program == 0:
        list_tasks(
            slots, first, counts, rank_of_slot, first_slot, slots_of_rank, lists,
            NUM_LOGICAL, NUM_SLOTS, MOST_SLOTS, EXPERTS, TILE,
        )  # fmt: skip
    else:
        counted = _counted(num_tokens, top_k, num_ids, PADDED)
        bins = tl.arange(0, EXPERTS)
        summed = tl.zeros([EXPERTS], tl.int32)
        begin = (program - 1) * blocks_each
        block = begin
        while block < tl.minimum(begin + blocks_each, num_blocks):
            expert = _experts_of(ids, block * BLOCK + tl.arange(0, BLOCK), counted, NUM_LOGICAL)
            found = tl.histogram(tl.maximum(expert, 0), EXPERTS, mask=expert >= 0)
            tl.store(block_counts + block * NUM_LOGICAL + bins, found, mask=bins < NUM_LOGICAL)
            summed += found
            block += 1
        if GATHERED:
            tl.atomic_add(
                sums + bins,
                summed.to(sums.dtype.element_ty),
                mask=(bins < NUM_LOGICAL) & (summed > 0),
                sem="relaxed",
            )
        else:
            tl.store(sums + (program - 1) * NUM_LOGICAL + bins, summed, mask=bins < NUM_LOGICAL)


@triton.jit(do_not_specialize=VARIES)
def split(
    ids,
    num_tokens,
    rows,
    slots,
    first,
    counts,
    rank_of_slot,
    first_slot,
    slots_of_rank,
    lists,
    total,
    own_costs,
    arrived,
    steps,
    block_counts,
    before_block,
    lower_ranks,
    positions,
    top_k,
    num_ids,
    num_blocks,
    num_rows,
    rank,
    NUM_LOGICAL: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    MOST_SLOTS: tl.constexpr,
    EXPERT_COST: tl.constexpr,
    EXPERTS: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    FINE_SWEEPS: tl.constexpr,
    SHIFT: tl.constexpr,
    MOST_FINE: tl.constexpr,
    MOST: tl.constexpr,
    PADDED: tl.constexpr,
    GATHERED: tl.constexpr,
):
    """Program 0 splits the batch, see `split_batch`. The next ones sum counts, the others find positions.

    Args:
        rows: integer [num_rows, logical], ids of each expert: those of a rank, if GATHERED, or of a part.
        rank: the row of this rank, if GATHERED.
        before_block: int32 [num_blocks, logical]; written: ids of each expert in the blocks before.
        lower_ranks: int32 [logical], if GATHERED; written: tokens of each expert on lower ranks.
        positions: int32 [num_ids]; written: earlier ids of the same expert in the same block.
    """
    program = tl.program_id(0)
    parts = tl.cdiv(NUM_LOGICAL, PART)
    if program == 0:
        split_batch(
            rows, num_rows, slots, first, counts, rank_of_slot, first_slot, slots_of_rank, lists, total,
            own_costs, arrived, steps, NUM_LOGICAL, NUM_SLOTS, NUM_RANKS, MOST_SLOTS, EXPERT_COST,
            EXPERTS, RANKS, WIDTH, FINE_SWEEPS, SHIFT, MOST_FINE, MOST,
        )  # fmt: skip
    elif program <= parts:
        _sum_blocks(
            program - 1,
            rows,
            rank,
            block_counts,
            num_blocks,
            before_block,
            lower_ranks,
            NUM_LOGICAL,
            GATHERED,
        )
    else:
        counted = _counted(num_tokens, top_k, num_ids, PADDED)
        _find_positions((program - 1 - parts) * CHUNK, ids, counted, num_ids, positions, NUM_LOGICAL)


@triton.jit
def _sum_blocks(
    part,
    rows,
    rank,
    block_counts,
    num_blocks,
    before_block,
    lower_ranks,
    NUM_LOGICAL: tl.constexpr,
    GATHERED: tl.constexpr,
):
    """Of PART experts: ids in the blocks before each block, and tokens on the ranks before this one."""
    DEPTH: tl.constexpr = 32
    expert = part * PART + tl.arange(0, PART)
    known = expert < NUM_LOGICAL
    row = tl.arange(0, DEPTH)
    passed = tl.zeros([PART], tl.int32)
    begin = 0
    while begin < num_blocks:
        at = (begin + row)[:, None] * NUM_LOGICAL + expert[None, :]
        mask = (begin + row < num_blocks)[:, None] & known[None, :]
        found = tl.load(block_counts + at, mask=mask, other=0)
        tl.store(before_block + at, passed[None, :] + tl.cumsum(found, 0) - found, mask=mask)
        passed += tl.sum(found, 0)
        begin += DEPTH
    if GATHERED:
        lower = tl.zeros([PART], tl.int32)
        source = 0
        while source < rank:
            at = (source + row)[:, None] * NUM_LOGICAL + expert[None, :]
            mask = (source + row < rank)[:, None] & known[None, :]
            lower += tl.sum(tl.load(rows + at, mask=mask, other=0).to(tl.int32), 0)
            source += DEPTH
        tl.store(lower_ranks + expert, lower, mask=known)


@triton.jit
def _find_positions(begin, ids, counted, num_ids, positions, NUM_LOGICAL: tl.constexpr):
    """The positions of the CHUNK ids from `begin` on, by comparing all pairs."""
    mine = begin + tl.arange(0, CHUNK)
    expert = _experts_of(ids, mine, counted, NUM_LOGICAL)
    position = tl.zeros([CHUNK], tl.int32)
    other = begin // BLOCK * BLOCK
    while other <= begin:
        theirs = other + tl.arange(0, CHUNK)
        same = _experts_of(ids, theirs, counted, NUM_LOGICAL)[None, :] == expert[:, None]
        position += tl.sum((same & (theirs[None, :] < mine[:, None])).to(tl.int32), 1)
        other += CHUNK
    tl.store(positions + mine, position, mask=mine < num_ids)


@triton.jit(do_not_specialize=VARIES)
def assign(
    ids,
    num_tokens,
    rows,
    slots,
    first,
    counts,
    rank_of_slot,
    lists,
    before_block,
    lower_ranks,
    positions,
    chosen,
    top_k,
    num_ids,
    rank,
    NUM_LOGICAL: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    IDS: tl.constexpr,
    PADDED: tl.constexpr,
    GATHERED: tl.constexpr,
):
    """The slot of each id, by its position among those of its expert.

    Of the tokens of an expert on a rank that holds it, as many stay there as its quota allows. The others, in
    the order of ranks and of tokens, fill what is left of the quotas in the order of slots.

    Args:
        lists, before_block, lower_ranks, positions: by `split`.
        chosen: integer [num_ids]; written: slots, -1 for what is no expert.
    """
    at = tl.program_id(0) * IDS + tl.arange(0, IDS)
    counted = _counted(num_tokens, top_k, num_ids, PADDED)
    expert = _experts_of(ids, at, num_ids, NUM_LOGICAL)
    known = expert >= 0
    start = tl.load(first + expert, mask=known, other=0).to(tl.int32)
    count = tl.load(counts + expert, mask=known, other=0).to(tl.int32)
    most = tl.max(count)
    place = tl.load(positions + at, mask=known, other=0)
    place += tl.load(before_block + at // BLOCK * NUM_LOGICAL + expert, mask=known, other=0)
    # What stays on this rank; what does not stay on lower ranks comes before the others of this one.
    home = tl.full([IDS], -1, tl.int32)
    stays = tl.zeros([IDS], tl.int32)
    if GATHERED:
        lower = tl.load(lower_ranks + expert, mask=known, other=0)
        begin = 0
        while begin < most:
            slot, holder, _, stay = _quotas(
                begin, rows, slots, rank_of_slot, lists, expert, start, count,
                NUM_LOGICAL, NUM_SLOTS, GATHERED,
            )  # fmt: skip
            lower -= tl.sum(tl.where(holder < rank, stay, 0), 1)
            own = (holder == rank) & (stay > 0)
            stays += tl.sum(tl.where(own, stay, 0), 1)
            home = tl.maximum(home, tl.max(tl.where(own, slot, -1), 1))
            begin += REPLICAS
        place = tl.where(place < stays, -1, place - stays + lower)
    found = tl.where(place < 0, home, -1)
    filled = tl.zeros([IDS], tl.int32)
    begin = 0
    while begin < most:
        slot, _, given, stay = _quotas(
            begin, rows, slots, rank_of_slot, lists, expert, start, count, NUM_LOGICAL, NUM_SLOTS, GATHERED
        )
        left = given - stay
        end = filled[:, None] + tl.cumsum(left, 1)
        mine = (place[:, None] < end) & (place[:, None] >= end - left)
        found = tl.maximum(found, tl.max(tl.where(mine, slot, -1), 1))
        filled += tl.sum(left, 1)
        begin += REPLICAS
    if PADDED:
        spread = at // top_k % tl.maximum(count, 1)
        padding = tl.load(slots + start + spread, mask=known & (count > 0), other=-1).to(tl.int32)
        found = tl.where(at < counted, found, padding)
    tl.store(chosen + at, found.to(chosen.dtype.element_ty), mask=at < num_ids)


@triton.jit
def _quotas(
    begin,
    rows,
    slots,
    rank_of_slot,
    lists,
    expert,
    start,
    count,
    NUM_LOGICAL: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    GATHERED: tl.constexpr,
):
    """Of REPLICAS replicas of each expert: slot, rank, tokens, and those of them that stay on their rank."""
    index = begin + tl.arange(0, REPLICAS)[None, :]
    slot = tl.load(slots + start[:, None] + index, mask=index < count[:, None], other=-1).to(tl.int32)
    there = (slot >= 0) & (slot < NUM_SLOTS)
    given = tl.load(lists + GIVEN * NUM_SLOTS + slot, mask=there, other=0)
    holder = tl.full(slot.shape, -1, tl.int32)
    stay = tl.zeros(slot.shape, tl.int32)
    if GATHERED:
        holder = tl.load(rank_of_slot + slot, mask=there, other=-1)
        held = tl.load(rows + holder * NUM_LOGICAL + expert[:, None], mask=there, other=0).to(tl.int32)
        stay = tl.minimum(held, given)
    return slot, holder, given, stay
