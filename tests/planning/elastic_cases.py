"""What every plan around dead, joined or uneven ranks has to keep, slot by slot; random loads and tables."""

from __future__ import annotations

import pytest
import torch

import eplb_plugin as eplb


def random_load(*shape: int, seed: int = 0, sigma: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(*shape).log_normal_(4, sigma, generator=generator).round()


def random_table(layers: int, experts: int, slots: int, empty: float, seed: int) -> torch.Tensor:
    """int64 [layers, slots]: any experts, a share `empty` of the slots without one."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(experts, (layers, slots), generator=generator)
    return table.masked_fill(torch.rand(layers, slots, generator=generator) < empty, -1)


def by_rank(row: torch.Tensor, topology: eplb.Topology) -> list[list[int]]:
    """The experts on each rank, without empty slots."""
    ranks = range(topology.num_ranks)
    return [[e for e in row[topology.slots_of_rank(rank)].tolist() if e >= 0] for rank in ranks]


def check_plan(
    load: torch.Tensor,
    topology: eplb.Topology,
    planned: eplb.Plan,
    current: torch.Tensor | None = None,
    alive: list[bool] | None = None,
) -> None:
    """The rules of a placement, what it says of itself, and that its weights can be had."""
    alive = alive or [True] * topology.num_ranks
    dead_slots = torch.tensor([not alive[rank] for rank in topology.rank_of_slot().tolist()])
    rows = planned.placement.physical_to_logical
    num_logical = load.shape[-1]
    table = torch.full_like(rows, -1) if current is None else current.masked_fill(dead_slots, -1)
    lost, moves, repeats = [], 0, 0
    for layer, (row, before) in enumerate(zip(rows, table, strict=True)):
        assert torch.equal(row < 0, dead_slots)
        assert set(row[~dead_slots].tolist()) == set(range(num_logical))
        lost += [(layer, e) for e in range(num_logical) if e not in before.tolist()]
        for was, now in zip(by_rank(before, topology), by_rank(row, topology), strict=True):
            moves += len(set(now) - set(was))
            repeats += len(now) - len(set(now))
        # Experts that stay on a rank keep as many of their slots as they have use for.
        for rank in range(topology.num_ranks):
            was, now = before[topology.slots_of_rank(rank)], row[topology.slots_of_rank(rank)]
            for expert in set(was.tolist()) & set(now.tolist()) - {-1}:
                kept = int(((was == expert) & (now == expert)).sum())
                assert kept == min(int((was == expert).sum()), int((now == expert).sum()))
    assert planned.shared_replicas == repeats
    assert planned.balancedness == pytest.approx(eplb.balancedness(load, planned.placement, topology))
    peaks = eplb.rank_loads(load, planned.placement, topology).amax(2).mean(0)
    assert (planned.lower_bound <= peaks * (1 + 1e-9)).all()
    if current is None:
        assert planned.lost == ()
        assert planned.moves == 0
        return
    assert planned.lost == tuple(lost)
    assert planned.moves == moves
    check_migration(table, planned, topology, alive)


def check_migration(
    table: torch.Tensor, planned: eplb.Plan, topology: eplb.Topology, alive: list[bool]
) -> None:
    """Every slot of the new placement gets its expert from a slot that has it, or from the checkpoint."""
    plan = eplb.plan_migration(table, planned.placement, topology, active_ranks=alive)
    rank_of = topology.rank_of_slot().tolist()
    result = table.clone()
    sends, copies, reloads = plan.sends, plan.copies, plan.reloads
    assert torch.equal(table[sends.layer, sends.source_slot], sends.expert)
    assert all(alive[rank] for rank in sends.source_rank.tolist())
    assert [rank_of[slot] for slot in sends.source_slot.tolist()] == sends.source_rank.tolist()
    of = plan.arrivals.send
    assert [rank_of[slot] for slot in plan.arrivals.slot.tolist()] == sends.rank[of].tolist()
    result[sends.layer[of], plan.arrivals.slot] = sends.expert[of]
    result[copies.layer, copies.slot] = table[copies.layer, copies.source_slot]
    result[reloads.layer, reloads.slot] = reloads.expert
    filled = planned.placement.physical_to_logical
    assert torch.equal(torch.where(filled < 0, -1, result), filled)
    reloaded = set(zip(reloads.layer.tolist(), reloads.expert.tolist(), strict=True))
    assert reloaded == set(planned.lost)
    reloading = {
        (layer, rank_of[slot], expert)
        for layer, slot, expert in zip(
            reloads.layer.tolist(), reloads.slot.tolist(), reloads.expert.tolist(), strict=True
        )
    }
    assert plan.num_sends + len(reloading) == planned.moves
