"""A loop rebuilt on fewer or more ranks starts from what they hold, and moves no more than it has to."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import eplb_plugin as eplb
from eplb_plugin.runtime.rebalancer import Rebalancer
from eplb_plugin.runtime.weights.transfer import Transfer
from tests.processes import run_ranks
from tests.runtime.cases import fill, wrong_rows
from tests.runtime.test_rebalancer import FAST, LAYERS, LOGICAL, make_weights, options, serve

FOUR = eplb.Topology(num_ranks=4, num_slots=28)
THREE = eplb.Topology(num_ranks=3, num_slots=21)


def shrink_and_grow(rank: int) -> dict[str, object]:
    weights = make_weights(FOUR, rank)
    whole = Rebalancer(FOUR, LAYERS, LOGICAL, weights=weights, options=options(), planner=FAST)
    serve(whole, 4, rank)
    old = whole.placement
    whole.close()
    moved: list[int] = []

    def counted(self: Transfer) -> None:
        moved.append(sum(len(each.complete) for each in self._staged.rounds))
        start(self)

    start, Transfer.start = Transfer.start, counted  # type: ignore[method-assign]
    restored: list[tuple[int, int]] = []

    def restore(layer: int, expert: int, slot: int) -> None:
        restored.append((layer, expert))
        fill([tensor[slot : slot + 1] for tensor in weights[layer]], layer, [expert])

    # Rank 2 is gone; the others form a group of three.
    groups = dist.new_group([0, 1, 3]), dist.new_group([0, 1, 2, 3])
    result: dict[str, object] = {}
    held = eplb.regroup(old, FOUR, [0, 1, 3])
    assert int(held.min()) >= 0
    small_placement = None
    if rank != 2:
        small = Rebalancer(
            THREE,
            LAYERS,
            LOGICAL,
            weights=weights,
            placement=held,
            restore=restore,
            load=whole.window.load(),
            options=options(verify="all"),
            planner=FAST,
            group=groups[0],
        )
        mine = THREE.slots_of_rank(small.rank)
        assert wrong_rows(weights, small.placement, mine) == []
        result["lost"] = sorted(restored)
        kept = (small.placement.physical_to_logical == held)[:, mine]
        result["kept"] = int(kept.sum())
        serve(small, 4, small.rank)
        assert wrong_rows(weights, small.placement, mine) == []
        small_placement = small.placement
        small.close()

    # It comes back, with nothing: the others keep what they have.
    placements: list[object] = [None] * 4
    dist.all_gather_object(placements, small_placement and small_placement.physical_to_logical)
    before = eplb.Placement(placements[0], LOGICAL)  # type: ignore[arg-type]
    held = eplb.regroup(before, THREE, [0, 1, None, 2])
    if rank == 2:
        for tensors in weights:
            for tensor in tensors:
                tensor.zero_()
    moved.clear()
    grown = Rebalancer(
        FOUR,
        LAYERS,
        LOGICAL,
        weights=weights,
        placement=held,
        options=options(),
        planner=FAST,
        group=groups[1],
    )
    assert wrong_rows(weights, grown.placement, FOUR.slots_of_rank(rank)) == []
    result["arrived"] = sum(moved)
    serve(grown, 4, rank)
    assert wrong_rows(weights, grown.placement, FOUR.slots_of_rank(rank)) == []
    return result


def test_a_rank_fails_and_comes_back() -> None:
    results = run_ranks(shrink_and_grow, 4)
    survivors = [results[rank] for rank in (0, 1, 3)]
    lost = {pair for result in survivors for pair in result["lost"]}
    # 16 experts in 28 slots: what rank 2 alone held is loaded again, once each.
    assert len(lost) == sum(len(result["lost"]) for result in survivors)
    assert all(result["kept"] >= LAYERS * 7 * 0.6 for result in survivors)
    # The rank that came back fills its slots; the others hardly change.
    assert LAYERS * 7 * 0.8 <= results[2]["arrived"] <= LAYERS * 7
    assert sum(results[rank]["arrived"] for rank in (0, 1, 3)) <= LAYERS * 7


def without_a_way_back(rank: int) -> str:
    topology = eplb.Topology(num_ranks=2, num_slots=20)
    held = eplb.Placement.default(LAYERS, LOGICAL, 20).physical_to_logical.clone()
    held[1, held[1] == 3] = -1
    with pytest.raises(eplb.PlacementError) as caught:
        Rebalancer(
            topology, LAYERS, LOGICAL, weights=make_weights(topology, rank), placement=held, options=options()
        )
    held[1, 0] = 99
    with pytest.raises(eplb.PlacementError, match=r"ids -1\.\.99"):
        Rebalancer(topology, LAYERS, LOGICAL, placement=held, options=options())
    return str(caught.value)


def test_a_lost_expert_needs_a_way_to_restore_it() -> None:
    messages = run_ranks(without_a_way_back, 2)
    assert any("no rank holds 1 experts, (layer, expert) [(1, 3)]" in message for message in messages)


def test_regroup_names_what_it_cannot_do() -> None:
    placement = eplb.Placement.default(2, 4, 8)
    topology = eplb.Topology(num_ranks=4, num_slots=8)
    assert eplb.regroup(placement, topology, [3, None, 0]).tolist() == [[2, 3, -1, -1, 0, 1]] * 2
    for ranks in ([0, 0], [4], []):
        with pytest.raises(eplb.TopologyError, match="not ranks of an old group of 4"):
            eplb.regroup(placement, topology, ranks)


def test_one_rank_alone_restores_everything() -> None:
    topology = eplb.Topology(num_ranks=1, num_slots=20)
    weights = make_weights(topology, 0)
    for tensors in weights:
        for tensor in tensors:
            tensor.zero_()

    def restore(layer: int, expert: int, slot: int) -> None:
        fill([tensor[slot : slot + 1] for tensor in weights[layer]], layer, [expert])

    held = torch.full((LAYERS, 20), -1)
    balancer = Rebalancer(
        topology, LAYERS, LOGICAL, weights=weights, placement=held, restore=restore, options=options()
    )
    assert wrong_rows(weights, balancer.placement, slice(0, 20)) == []
