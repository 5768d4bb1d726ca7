"""Outcome of the demo: the records of all ranks merged into intervals and a summary."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...runtime.rebalancer import RebalanceReport
from .serving import Comparison, IntervalRecord

__all__ = ["DemoOutcome", "DemoTally", "IntervalOutcome"]


@dataclass(frozen=True)
class IntervalOutcome:
    """One interval over all ranks.

    Attributes:
        first_step: first step of the interval.
        steps: number of steps.
        balancedness: measured with rebalancing, mean over the steps.
        balancedness_even: the same, had the tokens of each expert been spread evenly over its replicas.
        balancedness_static: measured without rebalancing, mean over the steps.
        report: rebalance at the end of the interval, with the times of the slowest rank. None after the last
            interval, and while an earlier rebalance was running.
    """

    first_step: int
    steps: int
    balancedness: float
    balancedness_even: float
    balancedness_static: float
    report: RebalanceReport | None


@dataclass(frozen=True)
class DemoOutcome:
    """The whole run.

    Attributes:
        intervals: in time order.
        compared: outputs with and without rebalancing, compared.
        wrong_slots: slots whose weights contradict the placement, summed over intervals.
    """

    intervals: tuple[IntervalOutcome, ...]
    compared: Comparison
    wrong_slots: int

    @property
    def outputs_equal(self) -> bool:
        """Whether rebalancing changed no prediction, and every slot holds the weights of the placement."""
        return self.compared.wrong == 0 and self.wrong_slots == 0

    @property
    def balancedness(self) -> float:
        return self._mean([item.balancedness for item in self.intervals])

    @property
    def balancedness_even(self) -> float:
        return self._mean([item.balancedness_even for item in self.intervals])

    @property
    def balancedness_static(self) -> float:
        return self._mean([item.balancedness_static for item in self.intervals])

    def as_dict(self) -> dict[str, Any]:
        """The JSON of `--json`."""
        reports = [item.report for item in self.intervals if item.report is not None]
        return {
            "outputs_equal": self.outputs_equal,
            "tokens_compared": self.compared.tokens,
            "tokens_wrong": self.compared.wrong,
            "tokens_tied": self.compared.ties,
            "slots_wrong": self.wrong_slots,
            "largest_difference": self.compared.difference,
            "balancedness": self.balancedness,
            "balancedness_even": self.balancedness_even,
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
        check = f"outputs equal on all {self.compared.tokens} tokens"
        if not self.outputs_equal:
            wrong = f"{self.compared.wrong} of {self.compared.tokens} tokens"
            check = f"OUTPUTS DIFFER on {wrong}, {self.wrong_slots} slots wrong"
        return (
            f"balancedness {values['balancedness_static']:.3f} -> {values['balancedness_even']:.3f} by plans "
            f"-> {values['balancedness']:.3f} by dispatch; {values['rebalances']} rebalances moved "
            f"{values['moves']} experts ({values['bytes_moved'] / 1e6:.1f} MB), "
            f"planning {values['plan_seconds']:.2f} s, transfer {values['transfer_seconds']:.2f} s; {check}"
        )

    def _mean(self, values: list[float]) -> float:
        """Mean over steps without the first interval, which runs on the default placement in both models."""
        scored = range(min(1, len(values) - 1), len(values))
        steps = sum(self.intervals[index].steps for index in scored)
        return sum(values[index] * self.intervals[index].steps for index in scored) / steps


class DemoTally:
    """Merges the records of the ranks, in any order between ranks.

    Args:
        num_ranks: ranks of the demo.
    """

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._open: dict[int, list[IntervalRecord]] = defaultdict(list)
        self._intervals: list[IntervalOutcome] = []
        self._compared = Comparison()
        self._wrong_slots = 0

    @property
    def intervals(self) -> tuple[IntervalOutcome, ...]:
        """The intervals with records of all ranks."""
        return tuple(self._intervals)

    def add(self, record: IntervalRecord) -> None:
        """Add the record of one rank and interval."""
        self._compared += record.compared
        self._wrong_slots += record.wrong_slots
        records = self._open[record.interval]
        records.append(record)
        if len(records) < self._num_ranks:
            return
        # Each rank reports in order, so intervals are completed in order.
        del self._open[record.interval]
        first_step = sum(item.steps for item in self._intervals)
        balanced = _balancedness([item.rows for item in records])
        static = _balancedness([item.rows_static for item in records])
        even = _balancedness(list(np.sum([item.even for item in records], 0).transpose(2, 0, 1)))
        self._intervals.append(
            IntervalOutcome(first_step, len(record.rows), balanced, even, static, report=None)
        )
        for reports in zip(*(item.reports for item in records), strict=True):
            # A background rebalance ends after the interval at whose end it began.
            for index, item in enumerate(self._intervals):
                if item.first_step + item.steps == reports[0].step:
                    self._intervals[index] = replace(item, report=_slowest(reports))

    def outcome(self) -> DemoOutcome:
        """The run so far."""
        return DemoOutcome(self.intervals, self._compared, self._wrong_slots)


def _slowest(reports: Sequence[RebalanceReport]) -> RebalanceReport:
    """The reports of all ranks on one rebalance, which differ in times only, with the longest times."""
    times = ("gather_seconds", "plan_seconds", "transfer_seconds", "commit_seconds")
    return replace(reports[0], **{name: max(getattr(item, name) for item in reports) for name in times})


def _balancedness(rows: Sequence[np.ndarray[Any, np.dtype[Any]]]) -> float:
    """Mean over steps of the balancedness of `rows`: [steps, layers] of each rank, rank loads."""
    return float((np.mean(rows, 0).sum(1) / np.max(rows, 0).sum(1)).mean())
