"""Triton: the split of a batch over the replicas of its experts, equal to `split_kernels` to the token.

To fill in an expert changes the costs of its own ranks only. Experts without a common rank are therefore
filled in at the same time. Each rank is one lane. It goes through its replicated experts, its tasks, by their
ids and sweep after sweep. An expert is filled in once all its ranks have arrived at it. So each rank sees the
order of `split_kernels`. A sweep over 80 replicated experts on 128 ranks takes about 5 steps instead of 80.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tables import (
    COPIES,
    EXPERT,
    GIVEN,
    INDEX,
    PEERS,
    TASK,
    TASK_EXPERT,
    TASK_MANY,
    TASK_PEERS,
    TASK_SLOT,
    TASK_TOKENS,
    slot_of_task,
)

__all__ = ["split_batch"]


@triton.jit
def split_batch(
    rows,
    num_rows,
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
):
    """Split one batch: the even split, then sweeps over the replicated experts.

    Costs and tokens given are in parts of tokens until the end, see `split_kernels`.

    Args:
        rows: integer [num_rows, logical], whose sum is the tokens of each expert.
        lists: by `list_tasks`; written: GIVEN, tokens of each slot.
        total: int32 [logical]; written: tokens of each expert.
        own_costs: [slots], scratch: by task, what its expert costs on its rank.
        arrived: [slots], scratch: cost of the rank without this expert, while the rank is at it; else -1.
        steps: int32 [1]; written: dependent steps of the sweeps.
        EXPERT_COST: least cost of a replica in use, in tokens.
        RANKS, WIDTH: power of two, at least the ranks; slots of a rank that are loaded at once.
        MOST: above all costs; MOST + EXPERT_COST fits the integers of `own_costs` and `arrived`.
    """
    TYPE: tl.constexpr = own_costs.dtype.element_ty
    # 1. The tokens of each expert. Loads in flight hide their latency: 16 rows of 256 experts are 128 a lane.
    DEPTH: tl.constexpr = 16
    expert = tl.arange(0, EXPERTS)
    row = tl.arange(0, DEPTH)[:, None]
    tokens_of = tl.zeros([EXPERTS], tl.int32)
    begin = 0
    while begin < num_rows:
        mask = (begin + row < num_rows) & (expert < NUM_LOGICAL)[None, :]
        part = tl.load(rows + (begin + row) * NUM_LOGICAL + expert[None, :], mask=mask, other=0)
        tokens_of += tl.sum(part.to(tl.int32), 0)
        begin += DEPTH
    tl.store(total + expert, tokens_of, mask=expert < NUM_LOGICAL)
    tl.debug_barrier()
    shift = tl.where(tl.sum(tokens_of) <= MOST_FINE, SHIFT, 0).to(TYPE)
    fine_cost = tl.full([], EXPERT_COST, TYPE) << shift

    # 2. The even split.
    lane = tl.arange(0, RANKS)
    begin = tl.load(first_slot + lane, mask=lane < NUM_RANKS, other=0)
    size = tl.load(slots_of_rank + lane, mask=lane < NUM_RANKS, other=0)
    place = tl.arange(0, WIDTH)[None, :]
    cost = tl.zeros([RANKS], TYPE)
    tasks = tl.zeros([RANKS], tl.int32)
    most = tl.zeros([RANKS], tl.int32)
    for offset in range(0, MOST_SLOTS, WIDTH):
        slot = begin[:, None] + offset + place
        inside = offset + place < size[:, None]
        mine = tl.load(lists + EXPERT * NUM_SLOTS + slot, mask=inside, other=-1)
        task = tl.load(lists + TASK * NUM_SLOTS + slot, mask=inside, other=-1)
        index = tl.load(lists + INDEX * NUM_SLOTS + slot, mask=mine >= 0, other=0)
        copies = tl.load(lists + COPIES * NUM_SLOTS + slot, mask=mine >= 0, other=0)
        tokens = tl.load(total + mine, mask=mine >= 0, other=0)
        replicas = tl.load(counts + mine, mask=mine >= 0, other=1).to(tl.int32)
        whole = tokens // replicas
        rest = tokens - whole * replicas
        less, more = (
            _cost(whole.to(TYPE) << shift, fine_cost),
            _cost((whole + 1).to(TYPE) << shift, fine_cost),
        )
        cost += tl.sum(tl.where(mine < 0, 0, tl.where(index < rest, more, less)), 1)
        tasks += tl.sum((task >= 0).to(tl.int32), 1)
        most = tl.maximum(most, tl.max(replicas, 1))
        larger = tl.minimum(tl.maximum(rest - index, 0), copies).to(TYPE)
        tl.store(own_costs + task, larger * more + (copies - larger) * less, mask=task >= 0)
        tl.store(lists + TASK_TOKENS * NUM_SLOTS + task, tokens, mask=task >= 0)
        # Tasks follow below. A second replica on the same rank gets nothing.
        only = tl.where(replicas == 1, tokens, 0) << shift.to(tl.int32)
        tl.store(lists + GIVEN * NUM_SLOTS + slot, only, mask=inside & (task < 0))
        tl.store(arrived + slot, -1, mask=inside)
    tl.debug_barrier()

    # 3. The sweeps.
    highest = tl.max(cost)
    at = tl.zeros([RANKS], tl.int32)
    sweep = tl.zeros([RANKS], tl.int32)
    step = 0
    go = tl.max(tasks) > 0
    has_many = tl.max(most) > PEERS
    while go:
        active = (tasks > 0) & (sweep <= FINE_SWEEPS)
        # Found before the step: the next one need not wait for it, at the price of one step. The limit is for
        # tables that contradict themselves.
        go = (tl.max(active.to(tl.int32)) > 0) & (step < (FINE_SWEEPS + 1) * NUM_SLOTS)
        task = lists + begin + at
        slot = tl.load(task + TASK_SLOT * NUM_SLOTS, mask=active, other=0)
        tokens = tl.load(task + TASK_TOKENS * NUM_SLOTS, mask=active, other=0)
        own = tl.load(own_costs + begin + at, mask=active, other=0)
        rest_of_rank = cost - own
        in_whole = sweep == FINE_SWEEPS
        relaxed = rest_of_rank + (cost >> 1)
        base = tl.where(in_whole, (rest_of_rank + ((1 << shift) >> 1)) >> shift, relaxed)
        parts = tokens.to(TYPE) << tl.where(in_whole, 0, shift)
        least = tl.where(in_whole, EXPERT_COST, fine_cost)
        tl.store(arrived + slot, base, mask=active)
        tl.debug_barrier()
        given, fired = _fill(task, arrived, slot, base, parts, least, active, NUM_SLOTS, MOST)
        if has_many:
            many = tl.load(task + TASK_MANY * NUM_SLOTS, mask=active, other=0)
            key = tl.load(task + TASK_EXPERT * NUM_SLOTS, mask=active, other=0)
            # One at a time, the first in turn. Its ranks wait for no other expert of this kind.
            turn = tl.where(many > 0, sweep * NUM_LOGICAL + key, (FINE_SWEEPS + 1) * NUM_LOGICAL)
            chosen = tl.min(turn)
            member = (many > 0) & (turn == chosen)
            fired &= many == 0
            if tl.sum(member.to(tl.int32)) == tl.max(tl.where(member, many, -1)):
                start = tl.load(first + chosen % NUM_LOGICAL).to(tl.int32)
                count = tl.load(counts + chosen % NUM_LOGICAL).to(tl.int32)
                filled = _fill_many(
                    slots, rank_of_slot, start, count, arrived, slot, member, base, parts, least,
                    NUM_SLOTS, MOST,
                )  # fmt: skip
                given = tl.where(member, filled, given)
                fired |= member
        # Experts without tokens wait for nobody.
        fired = active & (fired | (tokens == 0))
        given = tl.where(tokens > 0, given, 0) << tl.where(in_whole, shift, 0)
        new = _cost(given, fine_cost)
        cost = tl.where(fired, rest_of_rank + new, cost)
        tl.debug_barrier()
        tl.store(arrived + slot, -1, mask=fired)
        tl.store(lists + GIVEN * NUM_SLOTS + slot, given.to(tl.int32), mask=fired)
        tl.store(own_costs + begin + at, new, mask=fired)
        at += fired.to(tl.int32)
        sweep += (fired & (at == tasks)).to(tl.int32)
        at = tl.where(at == tasks, 0, at)
        step += 1
        tl.debug_barrier()
    tl.store(steps, step)

    # 4. In whole tokens, or evenly if that has the lower peak.
    is_even = tl.max(cost) > highest
    for offset in range(0, MOST_SLOTS, WIDTH):
        slot = begin[:, None] + offset + place
        inside = offset + place < size[:, None]
        mine = tl.load(lists + EXPERT * NUM_SLOTS + slot, mask=inside, other=-1)
        given = tl.load(lists + GIVEN * NUM_SLOTS + slot, mask=inside, other=0) >> shift.to(tl.int32)
        if is_even:
            index = tl.load(lists + INDEX * NUM_SLOTS + slot, mask=mine >= 0, other=0)
            copies = tl.load(lists + COPIES * NUM_SLOTS + slot, mask=mine >= 0, other=0)
            task = tl.load(lists + TASK * NUM_SLOTS + slot, mask=inside, other=-1)
            tokens = tl.load(total + mine, mask=mine >= 0, other=0)
            replicas = tl.load(counts + mine, mask=mine >= 0, other=1).to(tl.int32)
            # The first replica on a rank gets the tokens of the others there.
            whole = tokens // replicas
            larger = tl.minimum(tl.maximum(tokens - whole * replicas - index, 0), copies)
            given = tl.where(task >= 0, copies * whole + larger, tl.where(replicas == 1, tokens, 0))
        tl.store(lists + GIVEN * NUM_SLOTS + slot, given, mask=inside)


@triton.jit
def _cost(tokens, least):
    return tl.where(tokens > 0, tl.maximum(tokens, least), 0)


@triton.jit
def _fill(
    task,
    arrived,
    slot,
    base,
    tokens,
    least,
    active,
    NUM_SLOTS: tl.constexpr,
    MOST: tl.constexpr,
):
    """Fill in the experts of the tasks, each of at most PEERS slots.

    Args:
        task: pointers to the task of each lane.
        slot, base, tokens: [ranks], of its task: slot, base of the rank, tokens of its expert.
        least: [ranks], least cost of a replica in use, in the unit of the tokens.

    Returns:
        Tokens of each rank; whether all ranks of its expert have arrived.
    """
    row = task + TASK_PEERS * NUM_SLOTS
    ahead = tl.zeros_like(slot)
    complete = active
    b0, ahead, complete = _peer(row + 0 * NUM_SLOTS, arrived, slot, base, active, ahead, complete, MOST)
    b1, ahead, complete = _peer(row + 1 * NUM_SLOTS, arrived, slot, base, active, ahead, complete, MOST)
    b2, ahead, complete = _peer(row + 2 * NUM_SLOTS, arrived, slot, base, active, ahead, complete, MOST)
    b3, ahead, complete = _peer(row + 3 * NUM_SLOTS, arrived, slot, base, active, ahead, complete, MOST)
    b4, ahead, complete = _peer(row + 4 * NUM_SLOTS, arrived, slot, base, active, ahead, complete, MOST)
    b5, ahead, complete = _peer(row + 5 * NUM_SLOTS, arrived, slot, base, active, ahead, complete, MOST)
    b6, ahead, complete = _peer(row + 6 * NUM_SLOTS, arrived, slot, base, active, ahead, complete, MOST)
    b7, ahead, complete = _peer(row + 7 * NUM_SLOTS, arrived, slot, base, active, ahead, complete, MOST)
    # Batcher's network sorts 8 values in 6 dependent stages.
    b0, b1 = _sorted(b0, b1)
    b2, b3 = _sorted(b2, b3)
    b4, b5 = _sorted(b4, b5)
    b6, b7 = _sorted(b6, b7)
    b0, b2 = _sorted(b0, b2)
    b1, b3 = _sorted(b1, b3)
    b4, b6 = _sorted(b4, b6)
    b5, b7 = _sorted(b5, b7)
    b1, b2 = _sorted(b1, b2)
    b5, b6 = _sorted(b5, b6)
    b0, b4 = _sorted(b0, b4)
    b1, b5 = _sorted(b1, b5)
    b2, b6 = _sorted(b2, b6)
    b3, b7 = _sorted(b3, b7)
    b2, b4 = _sorted(b2, b4)
    b3, b5 = _sorted(b3, b5)
    b1, b2 = _sorted(b1, b2)
    b3, b4 = _sorted(b3, b4)
    b5, b6 = _sorted(b5, b6)
    # The first number of ranks that reaches the least level is the fewest that hold the tokens below it: with
    # fewer ranks and room for the tokens, the level would be above it because of a rank that is used anyway.
    total, n1 = _level(tokens, b0, 1, least, MOST)
    total, n2 = _level(total, b1, 2, least, MOST)
    total, n3 = _level(total, b2, 3, least, MOST)
    total, n4 = _level(total, b3, 4, least, MOST)
    total, n5 = _level(total, b4, 5, least, MOST)
    total, n6 = _level(total, b5, 6, least, MOST)
    total, n7 = _level(total, b6, 7, least, MOST)
    total, n8 = _level(total, b7, 8, least, MOST)
    low, high = _least(_least(n1, n2), _least(n3, n4)), _least(_least(n5, n6), _least(n7, n8))
    _, used, whole, rest = _least(low, high)
    return tl.where(ahead < used, whole - base + (ahead < rest).to(base.dtype), 0), complete


@triton.jit
def _peer(row, arrived, slot, base, active, ahead, complete, MOST: tl.constexpr):
    """The cost of one rank of the expert, MOST for none. Counts ranks ahead; checks that all have arrived."""
    peer = tl.load(row, mask=active, other=-1)
    cost = tl.load(arrived + peer, mask=peer >= 0, other=MOST)
    lighter = (cost < base) | ((cost == base) & (peer < slot))
    return cost, ahead + lighter.to(tl.int32), complete & (cost >= 0)


@triton.jit
def _sorted(a, b):
    return tl.minimum(a, b), tl.maximum(a, b)


@triton.jit
def _level(total, base, NUMBER: tl.constexpr, least, MOST: tl.constexpr):
    """The level of NUMBER ranks, the last of base `base`; the number; what each gets at least; the rest."""
    total += tl.where(base < MOST, base, 0)
    share = total // NUMBER
    left = total - share * NUMBER
    return total, (tl.maximum(base + least, share + (left > 0).to(base.dtype)), NUMBER, share, left)


@triton.jit
def _least(few, more):
    """The one of two numbers of ranks whose level is less, the first of equal ones."""
    less = more[0] < few[0]
    return (
        tl.where(less, more[0], few[0]),
        tl.where(less, more[1], few[1]),
        tl.where(less, more[2], few[2]),
        tl.where(less, more[3], few[3]),
    )


@triton.jit
def _fill_many(
    slots,
    rank_of_slot,
    start,
    count,
    arrived,
    slot,
    member,
    base,
    tokens,
    least,
    NUM_SLOTS: tl.constexpr,
    MOST: tl.constexpr,
):
    """Fill in one expert of any number of slots. Its ranks, `member`, have arrived. Returns their tokens."""
    WIDTH: tl.constexpr = 16
    ahead = tl.zeros_like(slot)
    total = base + tokens
    begin = 0
    while begin < count:
        index = begin + tl.arange(0, WIDTH)
        peer = slot_of_task(slots, rank_of_slot, start, index, count, NUM_SLOTS)
        cost = tl.load(arrived + peer, mask=peer >= 0, other=MOST)[None, :]
        lighter = (cost < base[:, None]) | ((cost == base[:, None]) & (peer[None, :] < slot[:, None]))
        ahead += tl.sum(lighter.to(tl.int32), 1)
        total += tl.sum(tl.where(lighter, cost, 0), 1)
        begin += WIDTH
    ranks = ahead + 1
    share = total // ranks
    left = total - share * ranks
    reached = tl.maximum(base + least, share + (left > 0).to(base.dtype))
    level = tl.min(tl.where(member, reached, MOST))
    used = tl.min(tl.where(member & (reached == level), ranks, count))
    best = member & (ranks == used)
    whole = tl.sum(tl.where(best, share, 0))
    rest = tl.sum(tl.where(best, left, 0))
    return tl.where(ahead < used, whole - base + (ahead < rest).to(base.dtype), 0)
