"""The online loop with weights on a GPU: alone, and on several ranks over NCCL."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import eplb_plugin as eplb
from eplb_plugin.integration.torch_moe import MoEModel
from eplb_plugin.runtime.rebalancer import Rebalancer
from eplb_plugin.runtime.weights import transport as messages
from eplb_plugin.runtime.weights.transport import Transport
from tests.gpu.one_gpu import nccl_group, share_the_gpu
from tests.processes import RanksFailedError, run_ranks
from tests.runtime.cases import wrong_rows
from tests.runtime.test_rebalancer import (
    ALONE,
    FAST,
    GLOBAL,
    LAYERS,
    LOGICAL,
    PAIR,
    counts,
    make_weights,
    options,
)
from tests.runtime.test_torch_moe import CONFIG, PLANNER, batch

MOST = 4000  # steps
MOVES = 6  # rebalances that move something

pytestmark = pytest.mark.usefixtures("compiled")


def on_gpu(weights: list[list[torch.Tensor]], device: torch.device) -> list[list[torch.Tensor]]:
    return [[tensor.to(device) for tensor in tensors] for tensors in weights]


def checked(weights: list[list[torch.Tensor]], balancer: Rebalancer) -> None:
    """Weights and tables are what the placement in force says."""
    now = balancer.placement
    mine = balancer.topology.slots_of_rank(balancer.rank)
    assert wrong_rows([[t.cpu() for t in tensors] for tensors in weights], now, mine) == []
    width = now.logical_to_physical.shape[2]
    tables = balancer.tables.logical_to_physical[:, :, :width].cpu()
    assert torch.equal(tables, now.logical_to_physical)


def serve(rank: int, topology: eplb.Topology, mode: str, verify: str) -> list[object]:
    """Every step, what this rank holds is compared with the placement in force, and that with the others'."""
    device = share_the_gpu(rank)
    weights = on_gpu(make_weights(topology, rank), device)
    balancer = Rebalancer(
        topology,
        LAYERS,
        LOGICAL,
        weights=weights,
        options=options(mode=mode, interval=8, verify=verify, history=2, background_share=1.0),
        planner=FAST,
        device=device,
    )
    reports: list[object] = []
    moved = 0
    for step in range(MOST):
        for layer in range(LAYERS):
            balancer.record_counts(layer, counts(step // 8, rank, layer).to(device))
        report = balancer.step()
        checked(weights, balancer)
        if topology.num_ranks > 1:
            held: list[object] = [None] * topology.num_ranks
            dist.all_gather_object(
                held, (balancer.placement.physical_to_logical.tolist(), report and report.step)
            )
            assert all(other == held[0] for other in held)
        if report:
            assert not report.failed, report.reason
            assert report.mismatches == 0
            reports.append((report.step, report.layers, report.moves, report.balancedness_after))
            moved += report.layers > 0
        if moved >= MOVES:
            break
    assert moved >= MOVES
    assert balancer.off == ""
    balancer.close()
    return reports


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_one_rank_copies_within_itself(mode: str) -> None:
    assert run_ranks(serve, 1, ALONE, mode, "all")


# Fewer messages at once than a rebalance has: several rounds.
@mock.patch.object(messages, "_MOST_AT_ONCE", 2)
def serve_over_nccl(rank: int, mode: str, verify: str) -> list[object]:
    return serve(rank, GLOBAL, mode, verify)


@pytest.mark.parametrize(("mode", "verify"), [("sync", "all"), ("async", "all"), ("async", "sampled")])
def test_four_ranks_over_nccl(mode: str, verify: str) -> None:
    results = run_ranks(serve_over_nccl, 4, mode, verify, timeout=150.0)
    if mode == "sync":
        assert all(result == results[0] for result in results)


def serve_a_model(rank: int, mode: str) -> int:
    device = share_the_gpu(rank)
    group = nccl_group()
    topology = eplb.Topology(num_ranks=2, num_slots=16)
    choices = eplb.RebalancerOptions(mode=mode, interval=4, history=1, background_share=1.0)
    model = MoEModel(CONFIG, topology, options=choices, planner=PLANNER, group=group, device=device)
    reference = MoEModel(CONFIG, device=device)
    moves = 0
    for step in range(400):
        tokens = batch(step, rank).to(device)
        logits, expected = model.forward(tokens), reference.forward(tokens)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        report = model.step(is_dummy=not tokens.numel())
        assert model.wrong_slots() == 0
        if report:
            assert not report.failed, report.reason
            moves += report.moves
        if moves > MOVES and step >= 16:
            break
    model.rebalancer.close()
    return moves


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_outputs_are_those_of_one_process(mode: str) -> None:
    results = run_ranks(serve_a_model, 2, mode, timeout=150.0)
    assert results[0] == results[1] > 0


def lose_a_rank(rank: int, how: int, transfers: int, told: str) -> tuple[str, bool]:
    """Rank 1 stops or dies when all have agreed to send for the n-th time; the other turns balancing off and
    goes on."""
    device = share_the_gpu(rank)
    weights = on_gpu(make_weights(PAIR, rank), device)
    limit = 8.0
    balancer = Rebalancer(
        PAIR,
        LAYERS,
        LOGICAL,
        weights=weights,
        options=options(mode="sync", time_limit=limit),
        planner=FAST,
    )
    pids: list[int] = [0, 0]
    dist.all_gather_object(pids, os.getpid())
    start = Transport.start

    left = transfers

    def fail(self: Transport, sends: object, receives: object) -> object:
        nonlocal left
        left -= 1
        if rank == 1 and left == 0:
            os.kill(os.getpid(), how)
        return start(self, sends, receives)  # type: ignore[arg-type]

    before, took = balancer.placement, 0.0
    with mock.patch.object(Transport, "start", fail):
        for step in range(100):
            for layer in range(LAYERS):
                balancer.record_counts(layer, counts(step, rank, layer).to(device))
            began = time.monotonic()
            before = balancer.placement
            balancer.step()
            took = time.monotonic() - began
            if balancer.off:
                break
    if rank == 0:
        Path(told).write_text(f"{took:.1f} s: {balancer.off}")
        # The GPU still works, with what was there before.
        assert balancer.placement == before
        checked(weights, balancer)
        assert float((torch.ones(1000, device=device) * 2).sum()) == 2000.0
        assert balancer.step() is None
        assert balancer.off
        assert took < 4 * limit
        Path(told).write_text(f"went on after {took:.1f} s: {balancer.off}")
        os.kill(pids[1], signal.SIGCONT)
    return balancer.off, balancer.placement == before


# When the two connect, and when they have been connected for a while.
@pytest.mark.parametrize("transfers", [1, 3])
def test_a_rank_that_stops_amid_a_transfer(transfers: int, tmp_path: Path) -> None:
    told = tmp_path / "told"
    results = run_ranks(lose_a_rank, 2, signal.SIGSTOP, transfers, str(told))
    assert told.read_text().startswith("went on")
    assert all(off and kept for off, kept in results)


@pytest.mark.parametrize("transfers", [1, 3])
def test_a_rank_that_dies_amid_a_transfer(transfers: int, tmp_path: Path) -> None:
    told = tmp_path / "told"
    with pytest.raises(RanksFailedError) as failed:
        run_ranks(lose_a_rank, 2, signal.SIGKILL, transfers, str(told))
    # Rank 0 served on; the last meeting of the test's own group is what it could not keep.
    assert "died without a word" in failed.value.failures[1]
    assert told.read_text().startswith("went on")
