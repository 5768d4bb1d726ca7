"""Weights that the engine replaces while it is served, moves elsewhere, or gives to another balancer."""

from __future__ import annotations

import time
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

import eplb_plugin as eplb
from eplb_plugin.runtime.rebalancer import Rebalancer
from tests.processes import run_ranks
from tests.runtime.cases import wrong_rows
from tests.runtime.test_rebalancer import FAST, LAYERS, LOGICAL, PAIR, counts, make_weights

NEW = 64  # added to every byte


def balancer_of(rank: int, weights: list[list[torch.Tensor]], mode: str, **changes: object) -> Rebalancer:
    chosen = {"mode": mode, "interval": 4, "snapshots": 2, "history": 1, "background_share": 1.0}
    return Rebalancer(
        PAIR,
        LAYERS,
        LOGICAL,
        weights=weights,
        options=eplb.RebalancerOptions(**chosen | {"verify": "all", "time_limit": 20.0} | changes),
        planner=FAST.model_copy(update={"move_price": 0.0}),
    )


def serve(balancer: Rebalancer, rank: int, steps: range) -> list[eplb.RebalanceReport]:
    found = []
    for step in steps:
        for layer in range(LAYERS):
            balancer.record_counts(layer, counts(step // 2, rank, layer))
        report = balancer.step()
        if report is not None:
            found.append(report)
        if balancer.options.mode == "async":
            time.sleep(0.01)  # for the background
        dist.barrier()
    return found


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dim() else tensor


def shift(weights: list[list[torch.Tensor]], by: int) -> None:
    """Other weights, of which `wrong_rows` finds nothing wrong once they are shifted back."""
    for tensors in weights:
        for tensor in tensors:
            as_bytes(tensor).add_(by)


def check(balancer: Rebalancer, weights: list[list[torch.Tensor]], rank: int) -> None:
    shift(weights, -NEW)
    assert wrong_rows(weights, balancer.placement, PAIR.slots_of_rank(rank)) == []
    shift(weights, NEW)


def moves_of(balancer: Rebalancer) -> int:
    assert not [report.reason for report in balancer.reports if report.failed or report.mismatches]
    return sum(report.moves for report in balancer.reports)


def replace_while_busy(rank: int, mode: str, elsewhere: bool) -> int:
    """A rebalance is under way when the engine loads new weights, to new memory or where they are."""
    weights = [
        [torch.nn.Parameter(t, requires_grad=False) for t in layer] for layer in make_weights(PAIR, rank)
    ]
    balancer = balancer_of(rank, weights, mode)
    serve(balancer, rank, range(5))
    with balancer.replacing_weights():
        serve(balancer, rank, range(5, 14))
        before = balancer.placement
        if elsewhere:
            for layer in weights:
                for tensor in layer:
                    tensor.data = tensor.data.clone()
        shift(weights, NEW)
        assert balancer.rebalance().skipped
        assert balancer.placement == before
    check(balancer, weights, rank)
    serve(balancer, rank, range(14, 40))
    check(balancer, weights, rank)
    balancer.close()
    check(balancer, weights, rank)
    return moves_of(balancer)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["in place", "elsewhere"])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_rebalance_never_mixes_old_weights_and_new_ones(mode: str, elsewhere: bool) -> None:
    moves = run_ranks(replace_while_busy, 2, mode, elsewhere)
    assert moves[0] == moves[1] > 0


def fail_to_replace(rank: int) -> str:
    weights = make_weights(PAIR, rank)
    balancer = balancer_of(rank, weights, "sync", time_limit=5.0)
    if rank == 0:
        with pytest.raises(OSError, match="no such checkpoint"), balancer.replacing_weights():
            raise OSError("no such checkpoint")
    else:
        with pytest.raises(eplb.RankLostError), balancer.replacing_weights():
            pass
    assert balancer.step() is None
    with balancer.replacing_weights():
        pass  # nothing is left to be done
    return balancer.off


def test_a_rank_that_fails_to_load_them_turns_balancing_off() -> None:
    first, second = run_ranks(fail_to_replace, 2)
    assert first == "weights were not replaced: OSError: no such checkpoint"
    assert second.startswith("weights were not replaced: RankLostError")


def move_elsewhere_in_secret(rank: int) -> tuple[bool, str]:
    weights = [
        [torch.nn.Parameter(t, requires_grad=False) for t in layer] for layer in make_weights(PAIR, rank)
    ]
    balancer = balancer_of(rank, weights, "sync")
    serve(balancer, rank, range(4))
    before = balancer.placement
    if rank == 1:
        weights[1][0].data = weights[1][0].data.clone()
    (report,) = serve(balancer, rank, range(4, 8))
    assert balancer.placement == before
    return report.failed, report.reason


def test_weights_that_lie_elsewhere_are_noticed() -> None:
    for failed, reason in run_ranks(move_elsewhere_in_secret, 2):
        assert failed
        assert "rank 1: TransferError: tensor 0 of layer 1 has other memory than when it was" in reason


def register_twice(rank: int) -> None:
    weights = make_weights(PAIR, rank)
    first = balancer_of(rank, weights, "sync")
    with pytest.raises(
        eplb.EplbError, match="tensor 0 of layer 0 belongs to a balancer that is not closed yet"
    ):
        balancer_of(rank, weights, "sync")
    with pytest.raises(eplb.AgreementError):
        balancer_of(rank, make_weights(PAIR, rank), "sync", history=1 + rank)
    serve(first, rank, range(8))
    placement = first.placement
    first.close()
    second = Rebalancer(PAIR, LAYERS, LOGICAL, weights=weights, placement=placement, planner=FAST)
    second.close()
    assert wrong_rows(weights, placement, PAIR.slots_of_rank(rank)) == []


def test_no_two_balancers_move_the_same_weights() -> None:
    run_ranks(register_twice, 2)


def step_in_inference_mode(rank: int, mode: str, made: bool, stepped: str) -> int:
    weights = make_weights(PAIR, rank)
    with torch.inference_mode() if made else nullcontext():
        balancer = balancer_of(rank, weights, mode)
    for step in range(24):
        inside = stepped == "all" or (stepped == "some" and (step + rank) % 3 == 0)
        with torch.inference_mode() if inside else nullcontext():
            serve(balancer, rank, range(step, step + 1))
    balancer.close()
    assert wrong_rows(weights, balancer.placement, PAIR.slots_of_rank(rank)) == []
    return moves_of(balancer)


@pytest.mark.parametrize("stepped", ["none", "some", "all"])
@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_inference_mode_makes_no_difference(mode: str, made: bool, stepped: str) -> None:
    moves = run_ranks(step_in_inference_mode, 2, mode, made, stepped)
    assert moves[0] == moves[1] > 0
