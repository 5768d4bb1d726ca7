"""Running one rebalance at a time: within a step, or in a thread beside the steps."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from ..core.errors import UndecidedError
from .control.priority import give_way
from .control.scheduling import AtOnce, BetweenSteps, Pace
from .control.two_phase_commit import Decisions
from .rebalance import Outcome, Rebalance

__all__ = ["Runner"]


class Runner:
    """Its methods are for the serving thread. None of them raises what a rebalance raised: see `error`.

    Args:
        decisions: where ranks leave why they give up.
        rank: this rank.
        share: of a core's time that the background takes, on average.
        longest_rest: seconds that it rests between two meetings of the ranks, at most.

    Attributes:
        error: what ended the last rebalance before its end; there can be no other one then.
        reason: that in words, the same on all ranks that can still be reached: those of the first one.
    """

    def __init__(self, decisions: Decisions, rank: int, share: float, longest_rest: float) -> None:
        self._decisions = decisions
        self._rank = rank
        self._share = share
        self._longest_rest = longest_rest
        self._thread: threading.Thread | None = None
        self._pace = BetweenSteps(0)
        self._outcome: Outcome | None = None
        self.error: Exception | None = None
        self.reason = ""

    @property
    def busy(self) -> bool:
        """Whether a rebalance is under way; from the step on which it ends on all ranks, it is not."""
        return self._thread is not None

    def run(self, rebalance: Callable[[Pace], Rebalance]) -> None:
        """Run one here and now."""
        self._work(rebalance(AtOnce()))

    def start(self, rebalance: Callable[[Pace], Rebalance], step: int) -> None:
        """Start one in the background, this rank having ended `step` steps."""
        self._pace = BetweenSteps(step, self._share, self._longest_rest)
        self._thread = threading.Thread(
            target=self._work_beside, args=(rebalance(self._pace),), name="eplb-rebalance", daemon=True
        )
        self._thread.start()

    def step_ended(self, step: int) -> None:
        """Do what the one in the background wants done between this step and the next."""
        self._serve(lambda: self._pace.step_ended(step))

    def finish(self) -> None:
        """Do all that is left of the one in the background."""
        thread = self._thread
        if thread is not None:
            self._serve(lambda: self._pace.finish(lambda: not thread.is_alive()))

    def take(self) -> Outcome | None:
        """What came of the one that has ended, once."""
        outcome, self._outcome = self._outcome, None
        if self._thread is not None and outcome is not None:
            self._thread.join()
        if outcome is not None or self.error is not None:
            self._thread = None
        return outcome

    def _serve(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self.reason = self.reason or self._told(error)
            self.error = self.error or error

    def _work(self, rebalance: Rebalance) -> None:
        try:
            rebalance.run(self._ended)
        except Exception as error:  # of every kind, since the serving thread may be waiting for it
            self._give_up(error)

    def _work_beside(self, rebalance: Rebalance) -> None:
        give_way()
        try:
            rebalance.run(self._ended)
        except Exception as error:
            # First of all the serving thread, which may be waiting at its fence.
            if isinstance(error, UndecidedError):
                self._pace.fail(error)
            else:
                self._pace.release(None)
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        reason = self._told(error)
        try:
            if not isinstance(error, UndecidedError):
                # Where nobody can be asked, it is the reason of this rank alone.
                with contextlib.suppress(UndecidedError):
                    reason = self._decisions.decide("off", reason)
        finally:
            self.reason = reason
            self.error = error

    def _told(self, error: Exception) -> str:
        return f"rank {self._rank}: {type(error).__name__}: {error}"

    def _ended(self, outcome: Outcome) -> None:
        self._outcome = outcome
