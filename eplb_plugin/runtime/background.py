"""Runs one rebalance at a time: within a step, or in a thread beside the steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from ..config.options import RebalancerOptions
from ..core.errors import UndecidedError
from .connections import Connections
from .context import Context
from .control.scheduling import AtOnce, BetweenSteps, Scheduler
from .control.throttle import lower_priority
from .rebalance import Outcome, Request, rebalance

__all__ = ["Runner"]

_PAUSES = 0.25  # of the time limit, which runs for other ranks while this one pauses


class Runner:
    """Its methods are for the serving thread. An error of a rebalance is kept, not raised: see `error`.

    Attributes:
        error: what ended the last rebalance before its end; there can be no other one then.
        reason: the same in words: that of the first rank to give up, on all ranks that can be reached.
    """

    def __init__(self, connections: Connections, options: RebalancerOptions) -> None:
        self._connections, self._options = connections, options
        self._thread: threading.Thread | None = None
        self._scheduler = BetweenSteps(0)
        self._outcome: Outcome | None = None
        self.error: Exception | None = None
        self.reason = ""

    @property
    def busy(self) -> bool:
        """Whether a rebalance is under way; from the step on which it ends on all ranks, it is not."""
        return self._thread is not None

    def run(self, context: Context, request: Request) -> None:
        """Run a rebalance within this step."""
        try:
            self._rebalance(context, request, AtOnce())
        except Exception as error:
            self._give_up(error)
        context.streams.rejoin()

    def start(self, context: Context, request: Request) -> None:
        """Start a rebalance in the background, after `request.step` steps of this rank."""
        pauses = _PAUSES * self._options.time_limit
        self._scheduler = BetweenSteps(request.step, self._options.background_share, pauses)
        beside = partial(self._run_beside, context, request, self._scheduler)
        self._thread = threading.Thread(target=beside, name="eplb-rebalance", daemon=True)
        self._thread.start()

    def step_ended(self, step: int) -> None:
        """Do the switches that are due between this step and the next."""
        self._serve(partial(self._scheduler.step_ended, step))

    def finish(self) -> None:
        """Do all that is left of the rebalance in the background."""
        if self._thread is not None:
            self._serve(partial(self._scheduler.finish, self._thread))

    def take(self) -> Outcome | None:
        """The outcome of a rebalance that has ended, once."""
        outcome, self._outcome = self._outcome, None
        if self._thread is not None and outcome is not None:
            self._thread.join()
        if outcome is not None or self.error is not None:
            self._thread = None
        return outcome

    def _rebalance(self, context: Context, request: Request, scheduler: Scheduler) -> None:
        with context.streams.background():
            outcome = rebalance(context, request, scheduler)
        scheduler.release(outcome.step, [partial(self._show, outcome)])

    def _show(self, outcome: Outcome) -> None:
        self._outcome = outcome

    def _run_beside(self, context: Context, request: Request, scheduler: BetweenSteps) -> None:
        lower_priority()
        try:
            self._rebalance(context, request, scheduler)
        except Exception as error:  # of every kind: the serving thread may wait at its fence
            if isinstance(error, UndecidedError):
                scheduler.fail(error)
            else:
                scheduler.release(None)
            self._give_up(error)

    def _serve(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self.reason = self.reason or self._described(error)
            self.error = self.error or error

    def _give_up(self, error: Exception) -> None:
        reason = self._described(error)
        try:
            if not isinstance(error, UndecidedError):
                reason = self._connections.two_phase_commit.give_up(reason)
        finally:
            self.reason = reason
            self.error = error

    def _described(self, error: Exception) -> str:
        return f"rank {self._connections.control.rank}: {type(error).__name__}: {error}"
