"""Triton: the slots of each rank, and its tasks: its replicated experts by their ids."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["NUM_LISTS", "PEERS", "list_tasks", "slot_of_task"]

PEERS = tl.constexpr(8)
"""Slots of an expert that are listed with each of its tasks."""

# Rows of `lists`, int32 [NUM_LISTS, slots]. By slot:
EXPERT = tl.constexpr(0)  # its expert, -1 if empty
INDEX = tl.constexpr(1)  # its place among the slots of the expert
COPIES = tl.constexpr(2)  # slots of the expert on its rank
KEY = tl.constexpr(3)  # the expert, if it is replicated and this is its first slot on the rank; else -1
TASK = tl.constexpr(4)  # its task; -1 without a key
GIVEN = tl.constexpr(5)  # its tokens, by `split_batch`
# By task; those of a rank begin at its first slot:
TASK_EXPERT = tl.constexpr(6)
TASK_SLOT = tl.constexpr(7)
TASK_MANY = tl.constexpr(8)  # ranks of its expert if that has more than PEERS slots, else 0
TASK_TOKENS = tl.constexpr(9)  # of its expert, by `split_batch`
TASK_PEERS = tl.constexpr(10)  # PEERS rows: the slots of its expert, those with a task; -1 for none
NUM_LISTS = 18


@triton.jit
def list_tasks(
    slots,
    first,
    counts,
    rank_of_slot,
    first_slot,
    slots_of_rank,
    lists,
    NUM_LOGICAL: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    MOST_SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """List the slots of all ranks and their tasks. They depend on the placement only.

    Args:
        slots, first, counts: the replicas of the layer, see `LayerTables`.
        rank_of_slot: int32 [slots], rising.
        first_slot, slots_of_rank: int32 [ranks].
        lists: int32 [NUM_LISTS, slots]; written, all but what `split_batch` writes.
        MOST_SLOTS: of a rank.
        EXPERTS: power of two, at least the experts.
        TILE: slots at a time.
    """
    for begin in range(0, NUM_SLOTS, TILE):
        slot = begin + tl.arange(0, TILE)
        tl.store(lists + EXPERT * NUM_SLOTS + slot, -1, mask=slot < NUM_SLOTS)
    tl.debug_barrier()
    _list_slots(slots, first, counts, lists, NUM_LOGICAL, NUM_SLOTS, EXPERTS)
    tl.debug_barrier()
    for begin in range(0, NUM_SLOTS, TILE):
        _list_keys(begin, counts, rank_of_slot, first_slot, slots_of_rank, lists, NUM_SLOTS, MOST_SLOTS, TILE)
    tl.debug_barrier()
    for begin in range(0, NUM_SLOTS, TILE):
        _list_tasks(
            begin, slots, first, counts, rank_of_slot, first_slot, slots_of_rank, lists,
            NUM_SLOTS, MOST_SLOTS, TILE,
        )  # fmt: skip


@triton.jit
def _list_slots(
    slots, first, counts, lists, NUM_LOGICAL: tl.constexpr, NUM_SLOTS: tl.constexpr, EXPERTS: tl.constexpr
):
    """From experts to slots: EXPERT and INDEX."""
    expert = tl.arange(0, EXPERTS)
    known = expert < NUM_LOGICAL
    count = tl.load(counts + expert, mask=known, other=0).to(tl.int32)[:, None]
    start = tl.load(first + expert, mask=known, other=0).to(tl.int32)[:, None]
    most = tl.max(count)
    begin = 0
    while begin < most:
        index = begin + tl.arange(0, PEERS)[None, :]
        slot = tl.load(slots + start + index, mask=index < count, other=-1).to(tl.int32)
        there = (slot >= 0) & (slot < NUM_SLOTS)
        tl.store(lists + EXPERT * NUM_SLOTS + slot, expert[:, None], mask=there)
        tl.store(lists + INDEX * NUM_SLOTS + slot, index, mask=there)
        begin += PEERS


@triton.jit
def _list_keys(
    begin,
    counts,
    rank_of_slot,
    first_slot,
    slots_of_rank,
    lists,
    NUM_SLOTS: tl.constexpr,
    MOST_SLOTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The first slot of each replicated expert on each rank: KEY and COPIES."""
    slot = begin + tl.arange(0, TILE)
    inside = slot < NUM_SLOTS
    expert = tl.load(lists + EXPERT * NUM_SLOTS + slot, mask=inside, other=-1)
    count = tl.load(counts + expert, mask=expert >= 0, other=0).to(tl.int32)
    rank = tl.load(rank_of_slot + slot, mask=inside, other=0)
    own = tl.load(first_slot + rank)[:, None]
    end = own + tl.load(slots_of_rank + rank)[:, None]
    copies = tl.zeros([TILE], tl.int32)
    lower = tl.zeros([TILE], tl.int32)
    for offset in range(0, MOST_SLOTS, PEERS):
        other = own + offset + tl.arange(0, PEERS)[None, :]
        held = tl.load(lists + EXPERT * NUM_SLOTS + other, mask=other < end, other=-2)
        same = (held == expert[:, None]).to(tl.int32)
        copies += tl.sum(same, 1)
        lower += tl.sum(tl.where(other < slot[:, None], same, 0), 1)
    key = tl.where((count > 1) & (lower == 0), expert, -1)
    tl.store(lists + COPIES * NUM_SLOTS + slot, copies, mask=inside)
    tl.store(lists + KEY * NUM_SLOTS + slot, key, mask=inside)


@triton.jit
def _list_tasks(
    begin,
    slots,
    first,
    counts,
    rank_of_slot,
    first_slot,
    slots_of_rank,
    lists,
    NUM_SLOTS: tl.constexpr,
    MOST_SLOTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The tasks of each rank by the ids of their experts: TASK and what is listed by task."""
    slot = begin + tl.arange(0, TILE)
    inside = slot < NUM_SLOTS
    key = tl.load(lists + KEY * NUM_SLOTS + slot, mask=inside, other=-1)
    is_task = key >= 0
    rank = tl.load(rank_of_slot + slot, mask=inside, other=0)
    own = tl.load(first_slot + rank)
    end = own + tl.load(slots_of_rank + rank)
    task = own
    for offset in range(0, MOST_SLOTS, PEERS):
        other = own[:, None] + offset + tl.arange(0, PEERS)[None, :]
        held = tl.load(lists + KEY * NUM_SLOTS + other, mask=other < end[:, None], other=-1)
        task += tl.sum(((held >= 0) & (held < key[:, None])).to(tl.int32), 1)
    tl.store(lists + TASK * NUM_SLOTS + slot, tl.where(is_task, task, -1), mask=inside)
    tl.store(lists + TASK_EXPERT * NUM_SLOTS + task, key, mask=is_task)
    tl.store(lists + TASK_SLOT * NUM_SLOTS + task, slot, mask=is_task)

    count = tl.load(counts + key, mask=is_task, other=0).to(tl.int32)
    start = tl.load(first + key, mask=is_task, other=0).to(tl.int32)[:, None]
    ranks = tl.zeros([TILE], tl.int32)
    most = tl.max(count)
    offset = 0
    while offset < most:
        index = offset + tl.arange(0, PEERS)[None, :]
        peer = slot_of_task(slots, rank_of_slot, start, index, count[:, None], NUM_SLOTS)
        ranks += tl.sum((peer >= 0).to(tl.int32), 1)
        row = lists + (TASK_PEERS + index) * NUM_SLOTS
        tl.store(row + task[:, None], peer, mask=is_task[:, None] & (index < PEERS))
        offset += PEERS
    tl.store(lists + TASK_MANY * NUM_SLOTS + task, tl.where(count > PEERS, ranks, 0), mask=is_task)


@triton.jit
def slot_of_task(slots, rank_of_slot, start, index, count, NUM_SLOTS: tl.constexpr):
    """`slots[start + index]`, -1 if there is none or the one before is on the same rank."""
    has = index < count
    slot = tl.load(slots + start + index, mask=has, other=-1).to(tl.int32)
    last = tl.load(slots + start + index - 1, mask=has & (index > 0), other=-1).to(tl.int32)
    rank = tl.load(rank_of_slot + slot, mask=(slot >= 0) & (slot < NUM_SLOTS), other=-1)
    rank_before = tl.load(rank_of_slot + last, mask=(last >= 0) & (last < NUM_SLOTS), other=-1)
    return tl.where(rank == rank_before, -1, slot)
