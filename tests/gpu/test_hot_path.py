"""Counting and dispatch on a GPU: without waiting for it, and in a captured graph."""

from __future__ import annotations

import pytest
import torch

import eplb_plugin as eplb
from eplb_plugin.dispatch.even import EvenDispatch
from eplb_plugin.runtime.load_window import LoadWindow
from tests.runtime.cases import random_placement

LAYERS, LOGICAL, TOKENS, TOP_K = 3, 16, 64, 4
TOPOLOGY = eplb.Topology(num_ranks=4, num_slots=24)


def ids(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(-1, LOGICAL, (LAYERS, TOKENS, TOP_K), generator=generator)


def both() -> list[tuple[LoadWindow, EvenDispatch]]:
    """On the CPU, then on the GPU."""
    start = random_placement(LAYERS, LOGICAL, TOPOLOGY.num_slots, 0)
    return [
        (
            LoadWindow(LAYERS, LOGICAL, interval=4, snapshots=2, history=2, device=device),
            EvenDispatch(start, TOPOLOGY, rank=1, device=device),
        )
        for device in ("cpu", "cuda")
    ]


@pytest.mark.parametrize("way", ["eager", "graph", "graph and a larger batch"])
def test_counts_and_slots_are_those_of_the_cpu(way: str) -> None:
    cpu, gpu = both()
    valid = torch.arange(TOKENS) % 5 > 0
    batch, mask = ids(0).cuda(), valid.cuda()
    slots = torch.empty_like(batch)

    def serve() -> None:
        for layer in range(LAYERS):
            gpu[0].record(layer, batch[layer], mask)
            slots[layer] = gpu[1].physical(layer, batch[layer])

    serve()  # makes room for batches of this size
    run = serve
    if way != "eager":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            serve()
        run = graph.replay
    if way == "graph and a larger batch":
        larger = ids(0).repeat(1, 8, 1)
        for layer in range(LAYERS):
            gpu[0].record(layer, larger[layer].cuda(), valid.repeat(8).cuda())
            found = gpu[1].physical(layer, larger[layer].cuda())
            assert torch.equal(found.cpu(), cpu[1].physical(layer, larger[layer]))
        # Memory that the graph's buffers would have left free belongs to others from now on.
        taken = [torch.full((TOKENS << n,), -1, device="cuda") for n in range(6) for _ in range(64)]
    for window in (cpu[0], gpu[0]):
        window.step(is_dummy=True)
    for step in range(1, 4):
        placement = random_placement(LAYERS, LOGICAL, TOPOLOGY.num_slots, step)
        for _, tables in (cpu, gpu):
            tables.update(placement)
        batch.copy_(ids(step))
        try:
            torch.cuda.set_sync_debug_mode("error")
            run()
            gpu[0].step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for layer in range(LAYERS):
            cpu[0].record(layer, ids(step)[layer], valid)
            assert torch.equal(slots[layer].cpu(), cpu[1].physical(layer, ids(step)[layer]))
        cpu[0].step()
    assert torch.equal(gpu[0].take().snapshots.cpu(), cpu[0].take().snapshots)
    if way == "graph and a larger batch":
        assert all(bool((block == -1).all()) for block in taken)


def test_updates_keep_their_addresses() -> None:
    _, (_, tables) = both()
    before = tables._slots.data_ptr(), tables._first.data_ptr(), tables._count.data_ptr()
    tables.update(random_placement(LAYERS, LOGICAL, TOPOLOGY.num_slots, 5))
    assert (tables._slots.data_ptr(), tables._first.data_ptr(), tables._count.data_ptr()) == before
