"""Rebalancing in the background: ranks switch over in the same step, and serve meanwhile."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from eplb_plugin.runtime.rebalancer import Rebalancer
from tests.processes import run_ranks
from tests.runtime.cases import wrong_rows
from tests.runtime.test_rebalancer import FAST, GLOBAL, LAYERS, LOGICAL, counts, make_weights, options

MOST = 4000  # steps
MOVES = 6  # rebalances that move something


def serve_in_lockstep(
    rank: int, commit_layers: int, verify: str, share: float
) -> tuple[list[tuple[int, str, int, int, int]], int]:
    """Every step: the ranks compare their placement and tables, and each its weights with them."""
    weights = make_weights(GLOBAL, rank)
    balancer = Rebalancer(
        GLOBAL,
        LAYERS,
        LOGICAL,
        weights=weights,
        options=options(
            mode="async",
            interval=8,
            commit_layers=commit_layers,
            verify=verify,
            history=2,
            background_share=share,
        ),
        planner=FAST,
    )
    mine = GLOBAL.slots_of_rank(rank)
    reports: list[tuple[int, str, int, int, int]] = []
    placements, in_between = set(), 0
    for step in range(MOST):
        for layer in range(LAYERS):
            balancer.record_counts(layer, counts(step // 8, rank, layer))
        before = balancer.placement
        report = balancer.step()
        now = balancer.placement
        assert wrong_rows(weights, now, mine) == []
        width = now.logical_to_physical.shape[2]
        assert torch.equal(balancer.tables.logical_to_physical[:, :, :width], now.logical_to_physical)
        held: list[object] = [None] * 4
        dist.all_gather_object(held, (now.physical_to_logical.tolist(), report and report.step))
        assert all(other == held[0] for other in held)
        placements.add(str(held[0]))
        in_between += now != before and report is None
        if report:
            assert not report.failed
            reports.append((report.step, report.reason, report.layers, report.moves, report.mismatches))
        # How many steps a rebalance takes is up to the machine; what comes of it is alike on all ranks.
        if sum(layers > 0 for *_, layers, _, _ in reports) >= MOVES and in_between >= MOVES:
            break
    balancer.close()
    return reports, in_between


@pytest.mark.parametrize(
    ("commit_layers", "verify", "share"), [(1, "all", 1.0), (3, "off", 1.0), (1, "all", 0.3)]
)
def test_ranks_switch_over_in_the_same_step(commit_layers: int, verify: str, share: float) -> None:
    results = run_ranks(serve_in_lockstep, 4, commit_layers, verify, share)
    assert all(result == results[0] for result in results)
    reports, in_between = results[0]
    assert sum(layers > 0 for *_, layers, _, _ in reports) >= MOVES
    # Switching over is part of steps that have no report yet.
    assert in_between >= MOVES
    assert all(mismatches == 0 for *_, mismatches in reports)
