"""The planner inside SGLang's own rebalancing, on real processes: its recorder, manager and updater."""

from __future__ import annotations

import functools

import pytest
import torch

import eplb_plugin as eplb
from tests.engines.sglang.setups import Outcome, Setup
from tests.processes import run_ranks


def serve(rank: int, setup: Setup) -> Outcome:
    from tests.engines.sglang import eplb_ranks

    return eplb_ranks.serve(rank, setup)


def serve_with_their_algorithm(rank: int) -> tuple[int, bool]:
    from tests.engines.sglang import eplb_ranks

    return eplb_ranks.serve_with_their_algorithm(rank)


CASES = {
    "2 ranks": (2, Setup()),
    "4 ranks": (4, Setup(logical=16, redundant=8)),
    "2 ranks, chunks of one layer": (2, Setup(layers_per_chunk=1)),
    "4 ranks, chunks of two layers": (4, Setup(layers_per_chunk=2, layers=6)),
    "4 ranks on 2 nodes, 4 groups": (4, Setup(logical=16, redundant=8, nodes=2, groups=4)),
}


@functools.cache
def outcomes_of(case: str) -> list[Outcome]:
    world, setup = CASES[case]
    return run_ranks(serve, world, setup, timeout=180)


@pytest.mark.parametrize("case", CASES)
def test_weights_follow_the_map_through_rebalances(case):
    _, setup = CASES[case]
    outcomes = outcomes_of(case)
    for outcome in outcomes:
        # Each weight row after each step is the one that the map names; SGLang's own check is on, too.
        assert outcome.checked_rows > 0
        assert outcome.wrong_rows == 0
        assert outcome.failures == 0
        assert not outcome.dense_row_changed
        # The planner got exactly the passes of the interval, in order, also where SGLang's ring went round.
        assert outcome.recorded == outcome.expected
        assert outcome.maps == outcomes[0].maps
    reports = outcomes[0].reports
    assert len(reports) == setup.rebalances
    assert sum(report["moves"] for report in reports) > 0
    # Recent snapshots weigh more in the plan than in the prediction, so a single one may lose a little.
    window = [f"window_balancedness_{when}" for when in ("before", "after")]
    before, after = (sum(report[name] for report in reports) for name in window)
    assert after > before
    changed = [before != after for before, after in zip(outcomes[0].maps, outcomes[0].maps[1:], strict=False)]
    assert sum(changed) >= 2


def test_the_start_is_planned_from_a_recorded_load():
    """What SGLang does with `--init-expert-location COUNTS`."""
    setup = Setup(recorded=tuple(range(1, 13)), rebalances=2)
    outcomes = run_ranks(serve, 2, setup, timeout=180)
    load = torch.tensor([[0] * 12, *[setup.recorded] * 3])
    planned = eplb.plan(load, eplb.Topology(num_ranks=2, num_slots=16)).placement
    for outcome in outcomes:
        assert outcome.start == planned.physical_to_logical.tolist()
        assert outcome.wrong_rows == 0 < outcome.checked_rows


def test_groups_stay_within_their_node():
    case = "4 ranks on 2 nodes, 4 groups"
    _, setup = CASES[case]
    outcome = outcomes_of(case)[0]
    half = (setup.logical + setup.redundant) // 2
    for row in outcome.maps[-1][1:]:
        nodes = (row[:half], row[half:])
        groups = [{expert * setup.groups // setup.logical for expert in node} for node in nodes]
        assert not groups[0] & groups[1]


def test_ranks_keep_the_map_when_one_of_them_cannot_plan():
    # Without a price each plan differs from the map in force, so the ranks disagree when one keeps it.
    setup = Setup(failing_rank=1, algorithm="eplb_plugin:move_price=0,min_gain=0")
    outcomes = run_ranks(serve, 2, setup, timeout=180)
    assert [outcome.wrong_rows for outcome in outcomes] == [0, 0]
    assert outcomes[0].maps == outcomes[1].maps
    assert outcomes[0].maps[0] == outcomes[0].maps[1]  # the second rebalance changed nothing
    assert outcomes[0].maps[1] != outcomes[0].maps[-1]  # later ones did
    # Each rank counts the one rebalance that failed; one of them also knows why.
    assert [outcome.failures for outcome in outcomes] == [1, 1]
    reasons = [
        next(report["reason"] for report in outcome.reports if report["failed"]) for outcome in outcomes
    ]
    assert ["fails on purpose" in reason for reason in reasons] == [False, True]
    assert all("ranks planned different maps" in reason for reason in reasons)


def test_sglangs_own_algorithm_still_plans():
    """The plugin is loaded, the server names another algorithm: our planner is never asked."""
    for wrong, changed in run_ranks(serve_with_their_algorithm, 2, timeout=180):
        assert wrong == 0
        assert changed
