"""Tokens to slots: quotas kept exactly, tokens of a rank first on that rank, equal answers on all ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eplb_plugin as eplb
from eplb_plugin.dispatch.balanced import BalancedDispatch
from eplb_plugin.dispatch.batch_split import BatchSplit
from eplb_plugin.dispatch.tables import LayerTables
from tests.runtime.cases import random_placement

LOGICAL, SLOTS, RANKS = 7, 12, 4
TOPOLOGY = eplb.Topology(num_ranks=RANKS, num_slots=SLOTS)


def random_ids(seed: int, tokens: int, top_k: int = 3) -> torch.Tensor:
    """Skewed ids [tokens, top_k], some of them -1."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(tokens, top_k, generator=generator) ** 2 * (LOGICAL + 1)).long() - 1


def counts_of(ids: torch.Tensor) -> torch.Tensor:
    return torch.bincount(ids[ids >= 0], minlength=LOGICAL)


def slow_slots(
    batches: list[torch.Tensor], placement: eplb.Placement, expert_cost: int
) -> list[torch.Tensor]:
    """The slots of all ranks' tokens: first those that may stay, then the others, token by token."""
    total = torch.stack([counts_of(ids) for ids in batches]).sum(0)
    quota = eplb.balance_batch(total[None], placement, TOPOLOGY, expert_cost=expert_cost)[0].tolist()
    row = placement.physical_to_logical[0].tolist()
    chosen = [torch.full_like(ids, -1) for ids in batches]
    for only_own in (True, False):
        for rank, ids in enumerate(batches):
            own = range(SLOTS)[TOPOLOGY.slots_of_rank(rank)]
            for at, expert in enumerate(ids.flatten().tolist()):
                if expert < 0 or chosen[rank].view(-1)[at] >= 0:
                    continue
                slots = own if only_own else range(SLOTS)
                slot = next((s for s in slots if row[s] == expert and quota[s]), None)
                if slot is not None:
                    quota[slot] -= 1
                    chosen[rank].view(-1)[at] = slot
    assert not any(quota)
    return chosen


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.integers(0, 30), min_size=RANKS, max_size=RANKS),
    expert_cost=st.sampled_from([0, 8]),
)
def test_sharded_batches_keep_their_quotas_and_stay_where_they_may(
    seed: int, sizes: list[int], expert_cost: int
) -> None:
    placement = random_placement(1, LOGICAL, SLOTS, seed)
    batches = [random_ids(seed + rank, size) for rank, size in enumerate(sizes)]
    counts = torch.stack([counts_of(ids) for ids in batches])

    def gather(mine: torch.Tensor) -> torch.Tensor:
        assert torch.equal(mine, counts[rank])
        return counts

    all_wanted = slow_slots(batches, placement, expert_cost)
    for rank, wanted in enumerate(all_wanted):
        split = BatchSplit(TOPOLOGY, rank=rank, expert_cost=expert_cost, gather=gather)
        for dtype in (torch.int32, torch.int64):
            slots = BalancedDispatch(placement, TOPOLOGY, split).physical(0, batches[rank].to(dtype))
            assert slots.dtype == dtype
            assert torch.equal(slots, wanted.to(dtype))
        balanced = BalancedDispatch(placement, TOPOLOGY, split)
        slots, received = balanced.physical_and_received(0, batches[rank])
        assert torch.equal(slots, wanted)
        sent = torch.stack([torch.bincount(of[of >= 0], minlength=SLOTS) for of in all_wanted])
        assert received is not None
        assert torch.equal(received, sent[:, TOPOLOGY.slots_of_rank(rank)])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), tokens=st.integers(0, 40), expert_cost=st.sampled_from([0, 8]))
def test_replicated_batches_get_the_same_slots_on_every_rank(
    seed: int, tokens: int, expert_cost: int
) -> None:
    placement = random_placement(1, LOGICAL, SLOTS, seed)
    ids = random_ids(seed, tokens)
    quota = eplb.balance_batch(counts_of(ids)[None], placement, TOPOLOGY, expert_cost=expert_cost)[0]
    row = placement.physical_to_logical[0]
    answers = []
    for rank in range(RANKS):
        split = BatchSplit(TOPOLOGY, rank=rank, expert_cost=expert_cost)
        slots = BalancedDispatch(placement, TOPOLOGY, split).physical(0, ids)
        assert torch.equal(torch.where(slots >= 0, row[slots.clamp(min=0)], -1), ids)
        assert torch.equal(torch.bincount(slots[slots >= 0], minlength=SLOTS), quota)
        answers.append(slots)
    for expert in range(LOGICAL):  # position by position
        mine = answers[0][ids == expert]
        assert torch.equal(mine, mine.sort().values)
    assert all(torch.equal(answer, answers[0]) for answer in answers)


@given(seed=st.integers(0, 2**31), tokens=st.integers(0, 20), padding=st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_padding_changes_no_tokens_slot(seed: int, tokens: int, padding: int) -> None:
    placement = random_placement(1, LOGICAL, SLOTS, seed)
    split = BatchSplit(TOPOLOGY)
    tables = BalancedDispatch(placement, TOPOLOGY, split)
    row = tables.of_layer(0)
    ids, junk = random_ids(seed, tokens), random_ids(seed + 1, padding)
    slots = split.slots(torch.cat([ids, junk]), row, torch.tensor([tokens]))
    assert torch.equal(slots[:tokens], split.slots(ids, row))
    held = placement.physical_to_logical[0][slots.clamp(min=0)]
    assert torch.equal(torch.where(slots >= 0, held, -1), torch.cat([ids, junk]))
    more = split.slots(ids, row, torch.tensor([tokens + 5]))
    assert torch.equal(more, split.slots(ids, row))


def test_replicas_of_an_engines_padded_table_serve_as_well() -> None:
    placement = random_placement(1, LOGICAL, SLOTS, 3)
    table, count = placement.logical_to_physical[0], placement.replica_count[0]
    wide = torch.full((LOGICAL, 64), -1)
    wide[:, : table.shape[1]] = table
    split = BatchSplit(TOPOLOGY, expert_cost=4)
    ids = random_ids(3, 50)
    padded = LayerTables(wide.view(-1), torch.arange(LOGICAL) * 64, count)
    assert torch.equal(
        split.slots(ids, padded), BalancedDispatch(placement, TOPOLOGY, split).physical(0, ids)
    )


def test_ids_beyond_the_experts_are_refused_after_the_message() -> None:
    gathered = []

    def gather(counts: torch.Tensor) -> torch.Tensor:
        gathered.append(counts)
        return counts.expand(RANKS, -1).contiguous()

    split = BatchSplit(TOPOLOGY, gather=gather)
    tables = BalancedDispatch(random_placement(1, LOGICAL, SLOTS, 3), TOPOLOGY, split)
    for bad in (LOGICAL, -2):
        with pytest.raises(eplb.LoadError, match=f"holds {bad}; there are experts 0..6"):
            tables.physical(0, torch.tensor([0, bad, 1]))
    assert len(gathered) == 2
    with pytest.raises(eplb.LoadError, match="layer 1 of 1"):
        tables.physical(1, torch.tensor([0]))
    with pytest.raises(eplb.LoadError, match="expert_cost=-2 is below 0"):
        BatchSplit(TOPOLOGY, expert_cost=-2)
    with pytest.raises(eplb.LoadError, match=r"dtype torch.uint8, not int32 or int64"):
        tables.physical(0, torch.tensor([0, 1], dtype=torch.uint8))


def test_what_does_not_fit_together_is_refused() -> None:
    placement = random_placement(1, LOGICAL, SLOTS, 3)
    with pytest.raises(eplb.TopologyError, match=r"rank=-1 is outside 0..3"):
        BatchSplit(TOPOLOGY, rank=-1)
    other = BatchSplit(eplb.Topology(num_ranks=1, num_slots=2))
    with pytest.raises(eplb.TopologyError, match="for 2 slots on 1 ranks, the tables are for 12 on 4"):
        BalancedDispatch(placement, TOPOLOGY, other)


@pytest.mark.parametrize(
    ("gather", "says"),
    [
        (lambda counts: counts.expand(3, -1), r"int64 \(3, 7\), not torch.int64 \(4, 7\)"),
        (lambda counts: counts.expand(RANKS, -1).float(), r"float32 \(4, 7\), not torch.int64"),
        (lambda counts: torch.stack([counts, -counts, counts, counts]), "below 0, or others than its own"),
        (lambda counts: torch.stack([counts + 1] * RANKS), "others than its own for rank 0"),
    ],
)
def test_counts_that_nobody_can_have_gathered_are_refused(
    gather: Callable[[torch.Tensor], torch.Tensor], says: str
) -> None:
    tables = BalancedDispatch(
        random_placement(1, LOGICAL, SLOTS, 3), TOPOLOGY, BatchSplit(TOPOLOGY, gather=gather)
    )
    with pytest.raises(eplb.LoadError, match=says):
        tables.physical(0, torch.tensor([0, 1, 1]))


def test_a_lone_rank_needs_no_message() -> None:
    alone = eplb.Topology(num_ranks=1, num_slots=SLOTS)

    def gather(counts: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    tables = BalancedDispatch(random_placement(1, LOGICAL, SLOTS, 3), alone, BatchSplit(alone, gather=gather))
    slots, received = tables.physical_and_received(0, torch.tensor([0, 1, 1]))
    assert received is None
    assert torch.equal(slots, tables.physical(0, torch.tensor([0, 1, 1])))
