"""When a rebalance works and when it switches: within one step, or beside and between steps."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from .throttle import Throttle

__all__ = ["AtOnce", "BetweenSteps", "Scheduler", "Switch"]

Switch = Callable[[], None]
"""One change of what is in force, done by the serving thread."""

_ROUND_BYTES = 2 << 20  # about a millisecond of two cores over loopback
_LEAD = 2  # steps from the latest one to the proposal: time for the ranks to agree
_POLL = 0.01  # seconds


class Scheduler(Protocol):
    """Decides how much a rebalance does at once, and at which step the serving thread switches."""

    @property
    def round_bytes(self) -> int | None:
        """Bytes that a rank sends and receives before it pauses; None: no limit, nothing else runs."""

    @property
    def throttle(self) -> Throttle:
        """What the rebalance pauses by, between two pieces of work."""

    def propose_step(self) -> int:
        """Set a fence: the first step at which this rank can switch. Serving waits there for `release`."""

    def release(self, step: int | None, switches: Sequence[Switch] = ()) -> float:
        """Lift the fence, and wait until the serving thread has done `switches` in order; their seconds.

        `step`: of the first switch; each of the others comes one step later. None: there are none.
        """


class AtOnce:
    """For a rebalance within one step: all ranks are in the same step and stay there until its end."""

    round_bytes = None

    def __init__(self) -> None:
        self.throttle = Throttle(share=1.0, longest=0.0)

    def propose_step(self) -> int:
        return 0

    def release(self, step: int | None, switches: Sequence[Switch] = ()) -> float:
        start = time.perf_counter()
        for switch in switches:
            switch()
        return time.perf_counter() - start


class BetweenSteps:
    """For a rebalance in a background thread; the serving thread switches between its steps.

    The ranks step equally often, though not at the same instant. Each proposes a step that it has not
    reached, and its serving thread waits there (the fence). So no rank has passed the latest proposal: with
    proposals of 12, 12 and 14, all ranks can still switch at step 14.

    Args:
        step: steps that this rank has ended.
        share, longest: of the throttle.
    """

    round_bytes = _ROUND_BYTES

    def __init__(self, step: int, share: float = 1.0, longest: float = 1.0) -> None:
        self._step = step
        self._fence: int | None = None
        self._due: deque[tuple[int, Switch]] = deque()
        self._seconds = 0.0
        self._error: Exception | None = None
        self._hurry = False
        self._changed = threading.Condition()
        self.throttle = Throttle(share, longest)

    def propose_step(self) -> int:
        with self._changed:
            self._fence = self._step + _LEAD
            return self._fence

    def release(self, step: int | None, switches: Sequence[Switch] = ()) -> float:
        with self._changed:
            self._fence = None
            self._seconds = 0.0
            if step is not None:
                self._due.extend((step + after, switch) for after, switch in enumerate(switches))
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._due or self._error is not None)
            self._check()
            return self._seconds

    def fail(self, error: Exception) -> None:
        """The background: it cannot know whether to switch, so the serving thread has to raise `error`."""
        with self._changed:
            self._stop(error)

    def step_ended(self, step: int) -> None:
        """The serving thread: `step` steps have ended. Does the switches that are due; waits at the fence.

        Raises:
            The error given to `fail`, or that of a switch: this rank then differs from the others.
        """
        with self._changed:
            self._step = step
            self._changed.wait_for(lambda: self._fence is None or self._step < self._fence or self._error)
            self._check()
            self._switch()

    def finish(self, thread: threading.Thread) -> None:
        """The serving thread: do all switches at once, whatever the step, until the background has ended.
        Raises as `step_ended`."""
        self.throttle.lift()
        while thread.is_alive():
            with self._changed:
                self._hurry = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._due or self._error is not None, timeout=_POLL)
                self._check()
                self._switch()

    def _switch(self) -> None:
        while self._due and (self._hurry or self._due[0][0] <= self._step):
            start = time.perf_counter()
            try:
                self._due[0][1]()
            except Exception as error:
                self._stop(error)
                raise
            self._due.popleft()
            self._seconds += time.perf_counter() - start
            self._changed.notify_all()

    def _stop(self, error: Exception) -> None:
        self._error = error
        self.throttle.lift()
        self._changed.notify_all()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
