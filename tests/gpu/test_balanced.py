"""Dispatch `balanced` on a GPU: slots are those of the CPU, also in captured graphs, and nothing waits."""

from __future__ import annotations

import pytest
import torch

import eplb_plugin as eplb
from eplb_plugin.dispatch.balanced import BalancedDispatch
from eplb_plugin.dispatch.batch_split import BatchSplit
from eplb_plugin.dispatch.triton_batch import TritonSplit
from tests.dispatch.test_triton import TABLES, layer_tables, random_ids

SIZES = [
    # experts, slots, ranks, tokens, top_k
    (32, 40, 8, 256, 4),
    (128, 160, 16, 2048, 8),
    (256, 288, 32, 4096, 8),
    (256, 384, 128, 16384, 8),
    (60, 300, 300, 50, 3),
    (20, 24, 2, 7, 1),
]
Size = tuple[int, int, int, int, int]


def planned(size: Size, seed: int) -> tuple[eplb.Topology, eplb.Placement]:
    """A placement for skewed traffic; some experts get many replicas."""
    logical, slots, ranks, _, _ = size
    load = torch.empty(1, logical).log_normal_(0, 1.2, generator=torch.Generator().manual_seed(seed))
    topology = eplb.Topology(num_ranks=ranks, num_slots=slots)
    return topology, eplb.plan(load, topology, options=eplb.PlannerOptions(policy="greedy")).placement


def on_gpu(tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [tensor.cuda() for tensor in tensors]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("expert_cost", [0, 32, 2**40])
def test_the_split_is_that_of_the_cpu(size: Size, expert_cost: int) -> None:
    topology, placement = planned(size, 0)
    replicas = layer_tables(placement, topology, "listed int64")
    split = TritonSplit(topology, expert_cost=expert_cost, device="cuda")
    for seed in range(5):
        ids = random_ids(seed, size[3], size[4], size[0])
        counts = torch.bincount(ids[ids >= 0], minlength=size[0])
        wanted = eplb.balance_batch(counts[None], placement, topology, expert_cost=expert_cost)[0]
        found = split.split(counts.cuda(), type(replicas)(*on_gpu(replicas)))
        assert found.tokens.tolist() == wanted.tolist()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("way", TABLES)
@pytest.mark.parametrize("gathers", [False, True])
def test_slots_are_those_of_the_cpu(size: Size, way: str, gathers: bool) -> None:
    logical, _, ranks, tokens, top_k = size
    topology, placement = planned(size, 1)
    replicas = layer_tables(placement, topology, way)
    there = type(replicas)(*on_gpu(replicas))
    rank, real = ranks - 1, tokens * 3 // 4
    others = torch.stack([random_ids(n, 30, top_k, logical).flatten() for n in range(ranks)])
    rows = torch.stack([torch.bincount(mine[mine >= 0], minlength=logical) for mine in others])
    ids = random_ids(99, tokens, top_k, logical)
    rows[rank] = torch.bincount(ids[:real][ids[:real] >= 0], minlength=logical)
    for dtype in (torch.int32, torch.int64):
        bound = torch.tensor([real], dtype=dtype)
        splits = [
            BatchSplit(
                topology,
                rank=rank,
                expert_cost=8,
                gather=(lambda counts, device=device: rows.to(device)) if gathers else None,
                device=device,
            )
            for device in ("cpu", "cuda")
        ]
        wanted = splits[0].slots(ids.to(dtype), replicas, bound)
        found = splits[1].slots(ids.to(dtype).cuda(), there, bound.cuda())
        assert found.dtype == dtype
        assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_captured_graph_follows_ids_and_placements(size: Size) -> None:
    logical, slots, _, tokens, top_k = size
    topology, placement = planned(size, 2)
    cpu, gpu = (
        BalancedDispatch(placement, topology, BatchSplit(topology, expert_cost=8, device=device))
        for device in ("cpu", "cuda")
    )
    batch = random_ids(0, tokens, top_k, logical).cuda()
    gpu.physical(0, batch)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gpu.physical(0, batch)
    for seed in range(1, 5):
        ids, (_, placement) = random_ids(seed, tokens, top_k, logical), planned(size, seed)
        for dispatch in (cpu, gpu):
            dispatch.update(placement)
        batch.copy_(ids)
        try:
            torch.cuda.set_sync_debug_mode("error")
            graph.replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(found.cpu(), cpu.physical(0, ids))
        assert int(found.max()) < slots


def test_ids_beyond_the_experts_get_no_slot() -> None:
    topology, placement = planned(SIZES[0], 3)
    gpu = BalancedDispatch(placement, topology, BatchSplit(topology, device="cuda"))
    ids = torch.tensor([[0, 1], [32, -7], [2, 2**40]])
    found = gpu.physical(0, ids.cuda()).cpu()
    assert ((found >= 0) == ((ids >= 0) & (ids < 32))).all()


def test_nothing_waits_for_the_device() -> None:
    topology, placement = planned(SIZES[2], 4)
    split = BatchSplit(topology, gather=lambda n: n.expand(32, -1), device="cuda")
    gpu = BalancedDispatch(placement, topology, split)
    ids = random_ids(0, 64, 8, 256).cuda()
    gpu.physical(0, ids)
    try:
        torch.cuda.set_sync_debug_mode("error")
        gpu.physical(0, ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
