"""The outcome of the demo: the records of ranks merged, outputs compared, the summary and the exit code."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from eplb_plugin.cli import app, demo
from eplb_plugin.cli.demo.outcome import DemoOutcome, DemoTally, IntervalOutcome
from eplb_plugin.cli.demo.serving import Comparison, IntervalRecord, compare_outputs
from eplb_plugin.runtime.rebalancer import RebalanceReport


def outcome_of(**changes):
    report = RebalanceReport(
        step=4,
        skipped=False,
        reason="",
        balancedness_before=0.5,
        balancedness_after=0.9,
        layers=2,
        moves=3,
        bytes_moved=3_000_000,
        gather_seconds=0.1,
        plan_seconds=0.2,
        transfer_seconds=0.3,
        commit_seconds=0.1,
    )
    first = IntervalOutcome(
        first_step=0, steps=4, balancedness=0.5, balancedness_even=0.5, balancedness_static=0.5, report=report
    )
    skipped = replace(report, skipped=True, moves=0, bytes_moved=0, transfer_seconds=0, commit_seconds=0)
    second = IntervalOutcome(4, 4, 0.9, 0.8, 0.6, skipped)
    third = IntervalOutcome(8, 2, 0.6, 0.5, 0.3, None)
    outcome = DemoOutcome((first, second, third), Comparison(tokens=100), wrong_slots=0)
    return replace(outcome, **changes)


def test_the_outcome_in_json():
    values = outcome_of().as_dict()
    assert values["outputs_equal"] is True
    assert values["balancedness"] == pytest.approx((4 * 0.9 + 2 * 0.6) / 6)
    assert values["balancedness_even"] == pytest.approx((4 * 0.8 + 2 * 0.5) / 6)
    assert values["balancedness_static"] == pytest.approx((4 * 0.6 + 2 * 0.3) / 6)
    assert (values["rebalances"], values["moves"], values["bytes_moved"]) == (1, 3, 3_000_000)
    # The second one planned, too, but changed nothing.
    assert values["plan_seconds"] == pytest.approx(0.4)
    assert values["transfer_seconds"] == pytest.approx(0.4)
    json.dumps(values)


def test_a_run_of_one_interval_is_scored_on_it():
    outcome = outcome_of(intervals=outcome_of().intervals[:1])
    assert outcome.balancedness == 0.5


@pytest.mark.parametrize(
    ("changes", "exit_code", "text"),
    [
        ({}, 0, "outputs equal on all 100 tokens"),
        ({"compared": Comparison(100, wrong=7)}, 1, "OUTPUTS DIFFER on 7 of 100 tokens"),
        ({"wrong_slots": 1}, 1, "1 slots wrong"),
    ],
)
def test_the_exit_code_tells_whether_outputs_are_equal(monkeypatch, changes, exit_code, text):
    monkeypatch.setattr(demo, "run_demo", lambda settings, console: outcome_of(**changes))
    result = CliRunner().invoke(app, ["demo", "--json"])
    assert result.exit_code == exit_code
    *table, summary, last = result.stdout.splitlines()
    assert any("dispatch" in line for line in table)
    assert text in summary
    assert json.loads(last)["outputs_equal"] is (exit_code == 0)


def test_wrong_outputs_are_counted():
    expected = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [5.0, 5.0, 0.0], [1.0, 2.0, 3.0]])
    no_tie = torch.zeros(4, dtype=torch.bool)
    same = compare_outputs(expected.clone(), expected, no_tie)
    assert (same.wrong, same.ties, same.difference) == (0, 0, 0)
    # Rounding changes nothing, not even where it decides between two predictions that are level.
    rounded = expected + 1e-5 * torch.tensor([-1.0, 1.0, 0.0])
    assert compare_outputs(rounded, expected, no_tie).wrong == 0
    other = expected.clone()
    other[1, 1] = 2.5
    other[3] = torch.tensor([3.0, 2.0, 1.0])
    compared = compare_outputs(other, expected, no_tie)
    assert (compared.wrong, compared.ties, compared.difference) == (2, 0, 2)
    compared = compare_outputs(other, expected, torch.tensor([True, False, True, True]))
    assert (compared.wrong, compared.ties) == (1, 1)
    assert compared.difference == 0.5
    # What is not a number is wrong.
    assert compare_outputs(expected * torch.nan, expected, no_tie).wrong == 4


def record(interval, rows, **changes):
    values = {"compared": Comparison(10), "reports": (), "wrong_slots": 0}
    rows = np.array(rows, np.int64)
    # On each of two ranks, half of the pairs of this one.
    even = np.stack([rows / 2, rows / 2], 2)
    return IntervalRecord(interval, rows, even, rows[::-1], **{**values, **changes})


def test_records_of_ranks_are_put_together_in_any_order():
    tally = DemoTally(2)
    tally.add(record(0, [[4, 0], [2, 2]], compared=Comparison(10, wrong=1, difference=0.5)))
    # In the background a rebalance ends in the interval after the one whose end began it.
    report = replace(outcome_of().intervals[0].report, step=2)
    tally.add(record(1, [[1, 1]], compared=Comparison(10, ties=2), reports=(report,)))
    assert tally.intervals == ()
    tally.add(record(0, [[0, 4], [2, 2]], wrong_slots=3))
    (first,) = tally.intervals
    # Step 0: both layers have mean 2 and max 4; step 1 is even.
    assert first.balancedness == pytest.approx((0.5 + 1) / 2)
    assert first.balancedness_even == 1
    tally.add(record(1, [[1, 3]], reports=(replace(report, plan_seconds=0.7),)))
    assert [(part.first_step, part.steps) for part in tally.intervals] == [(0, 2), (2, 1)]
    assert tally.intervals[1].balancedness == pytest.approx(3 / 4)
    assert first.report is None
    assert tally.intervals[0].report == replace(report, plan_seconds=0.7)
    assert tally.intervals[1].report is None
    outcome = tally.outcome()
    assert outcome.compared == Comparison(40, wrong=1, ties=2, difference=0.5)
    assert outcome.wrong_slots == 3
