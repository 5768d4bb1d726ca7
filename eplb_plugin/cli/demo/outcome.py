"""From what the ranks of the demo report to what it says in the end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...runtime.rebalancer import RebalanceReport
from .serving import IntervalRecord

__all__ = ["DemoOutcome", "DemoTally", "IntervalOutcome"]


@dataclass(frozen=True)
class IntervalOutcome:
    """One interval over all ranks.

    Attributes:
        first_step: its first step.
        steps: its steps.
        balancedness: measured, mean over its steps.
        balancedness_static: the same of the model that is never rebalanced.
        report: the rebalance that its end began, with the seconds of the slowest rank; None after the last
            interval, and where one was still under way.
    """

    first_step: int
    steps: int
    balancedness: float
    balancedness_static: float
    report: RebalanceReport | None


@dataclass(frozen=True)
class DemoOutcome:
    """The whole run.

    Attributes:
        intervals: in time order.
        tokens: tokens whose outputs were compared.
        wrong: those that differed.
        ties: those that differed, but whose router was undecided between two experts.
        difference: largest difference between logits, apart from those.
        wrong_slots: slots found with other weights than the placement says, over all intervals.
    """

    intervals: tuple[IntervalOutcome, ...]
    tokens: int
    wrong: int
    ties: int
    difference: float
    wrong_slots: int

    @property
    def outputs_equal(self) -> bool:
        """Whether the rebalanced model said what the other one said, and held the weights it should."""
        return self.wrong == 0 and self.wrong_slots == 0

    @property
    def reports(self) -> tuple[RebalanceReport, ...]:
        """All rebalances, also those that found nothing worth changing."""
        return tuple(item.report for item in self.intervals if item.report is not None)

    @property
    def balancedness(self) -> float:
        return self._mean([item.balancedness for item in self.intervals])

    @property
    def balancedness_static(self) -> float:
        return self._mean([item.balancedness_static for item in self.intervals])

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        reports = self.reports
        return {
            "outputs_equal": self.outputs_equal,
            "tokens_compared": self.tokens,
            "tokens_wrong": self.wrong,
            "tokens_tied": self.ties,
            "slots_wrong": self.wrong_slots,
            "largest_difference": self.difference,
            "balancedness": self.balancedness,
            "balancedness_static": self.balancedness_static,
            "rebalances": sum(not item.skipped for item in reports),
            "moves": sum(item.moves for item in reports),
            "bytes_moved": sum(item.bytes_moved for item in reports),
            "plan_seconds": sum(item.plan_seconds for item in reports),
            "transfer_seconds": sum(item.transfer_seconds + item.commit_seconds for item in reports),
        }

    def summary(self) -> str:
        """The run in one line."""
        values = self.as_dict()
        if self.outputs_equal:
            check = f"outputs equal on all {self.tokens} tokens"
        else:
            check = f"OUTPUTS DIFFER on {self.wrong} of {self.tokens} tokens, {self.wrong_slots} slots wrong"
        return (
            f"balancedness {values['balancedness']:.3f} against {values['balancedness_static']:.3f} without "
            f"rebalancing; {values['rebalances']} rebalances moved {values['moves']} experts "
            f"({values['bytes_moved'] / 1e6:.1f} MB), planning {values['plan_seconds']:.2f} s, "
            f"transfer {values['transfer_seconds']:.2f} s; {check}"
        )

    def _mean(self, values: list[float]) -> float:
        """Mean over steps. The first interval runs on the same placement either way, so it is left out."""
        scored = range(min(1, len(values) - 1), len(values))
        steps = sum(self.intervals[index].steps for index in scored)
        return sum(values[index] * self.intervals[index].steps for index in scored) / steps


class DemoTally:
    """Puts the records of the ranks together as they arrive, in any order between ranks.

    Args:
        num_ranks: ranks that report.
    """

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._open: dict[int, list[IntervalRecord]] = defaultdict(list)
        self._intervals: list[IntervalOutcome] = []
        self._tokens = self._wrong = self._ties = self._wrong_slots = 0
        self._difference = 0.0

    @property
    def intervals(self) -> tuple[IntervalOutcome, ...]:
        """The intervals that all ranks have reported."""
        return tuple(self._intervals)

    def add(self, record: IntervalRecord) -> None:
        """Take in what one rank saw in one interval."""
        self._tokens += record.tokens
        self._wrong += record.wrong
        self._ties += record.ties
        self._wrong_slots += record.wrong_slots
        self._difference = max(self._difference, record.difference)
        records = self._open[record.interval]
        records.append(record)
        if len(records) < self._num_ranks:
            return
        # Every rank reports its intervals in order, so they are complete in order too.
        del self._open[record.interval]
        first_step = sum(item.steps for item in self._intervals)
        self._intervals.append(
            IntervalOutcome(
                first_step=first_step,
                steps=record.rows.shape[0],
                balancedness=_balancedness(np.stack([item.rows for item in records])),
                balancedness_static=_balancedness(np.stack([item.rows_static for item in records])),
                report=None,
            )
        )
        for reports in zip(*(item.reports for item in records), strict=True):
            self._attach(_slowest(reports))

    def _attach(self, report: RebalanceReport) -> None:
        """Show a rebalance with the interval whose end began it."""
        for index, item in enumerate(self._intervals):
            if item.first_step + item.steps == report.step:
                self._intervals[index] = replace(item, report=report)

    def outcome(self) -> DemoOutcome:
        """The run so far."""
        return DemoOutcome(
            intervals=self.intervals,
            tokens=self._tokens,
            wrong=self._wrong,
            ties=self._ties,
            difference=self._difference,
            wrong_slots=self._wrong_slots,
        )


def _slowest(reports: Sequence[RebalanceReport]) -> RebalanceReport:
    """What the ranks tell of one rebalance, which differs in the seconds alone."""
    return replace(
        reports[0],
        gather_seconds=max(report.gather_seconds for report in reports),
        plan_seconds=max(report.plan_seconds for report in reports),
        transfer_seconds=max(report.transfer_seconds for report in reports),
        commit_seconds=max(report.commit_seconds for report in reports),
    )


def _balancedness(rows: np.ndarray[Any, np.dtype[np.int64]]) -> float:
    """Mean over steps of mean / max load; rows: [ranks, steps, layers], computed by each rank."""
    return float((rows.mean(0).sum(1) / rows.max(0).sum(1)).mean())
