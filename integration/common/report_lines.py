"""Reports of rebalances in an engine: their line in the log, and plans that were withdrawn."""

from __future__ import annotations

from dataclasses import replace

from ...runtime.reports import RebalanceReport

__all__ = ["said_of", "withdrawn"]


def said_of(report: RebalanceReport) -> str:
    """The line of the log, without the number of the rebalance."""
    observed = f"balancedness {report.balancedness_before:.3f} observed"
    before, after = report.window_balancedness_before, report.window_balancedness_after
    if report.failed:
        said = f"failed, {report.reason}; the map in force stays"
    elif before is None or after is None:
        said = f"skipped, {report.reason}"
    elif report.skipped:
        said = f"skipped, {report.reason}; {observed}"
    else:
        said = (
            f"{observed}, {before:.3f} -> {after:.3f} predicted; {report.moves} moves in "
            f"{report.layers} layers; planned in {1000 * report.plan_seconds:.1f} ms"
        )
    if report.sampled_balancedness is not None:
        even, balanced = report.sampled_balancedness_even, report.sampled_balancedness
        said += f"; single steps {even:.3f} -> {balanced:.3f} by dispatch"
    if report.move_cost_seconds is not None and report.gain_seconds is not None and not report.skipped:
        cost, gain = 1000 * report.move_cost_seconds, 1000 * report.gain_seconds
        said += f"; moves cost {cost:.1f} ms and gain {gain:.1f} ms until the next one"
    return said


def withdrawn(report: RebalanceReport, cause: str) -> RebalanceReport:
    """The report of a plan that ranks did not agree on."""
    return replace(
        report,
        skipped=True,
        failed=True,
        reason="; ".join([*([report.reason] if report.failed else []), cause]),
        balancedness_after=report.balancedness_before,
        window_balancedness_after=report.window_balancedness_before,
        layers=0,
        moves=0,
        bytes_moved=0,
        move_cost_seconds=None,
        gain_seconds=None,
    )
