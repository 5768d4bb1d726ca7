"""When a rank works and switches over: at once, or beside and between the steps of a model that goes on
serving."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from .throttle import Rests

__all__ = ["AtOnce", "BetweenSteps", "Pace"]


_PIECE = 2 << 20  # bytes: about a millisecond of two cores over loopback


class Pace(Protocol):
    """How a rebalance does its work and has its commits done."""

    @property
    def piece(self) -> int | None:
        """Bytes to send at once, to rest after; None: all of them, since nothing else goes on meanwhile."""

    def met(self) -> None:
        """All ranks have just met; from here on some may wait for others."""

    def moved(self, num_bytes: int, seconds: float) -> None:
        """So many bytes were sent and received at once, in so many seconds."""

    def rest(self) -> None:
        """Between two pieces of work. Returns when the next one may begin."""

    def propose(self) -> int:
        """The first step that this rank can still switch over in; it will not go past it until `release`."""

    def release(self, step: int | None, commits: Sequence[Callable[[], None]] = ()) -> float:
        """Have `commits` done, the first in `step`, the others in the steps after it; None: there are none.

        Returns:
            Seconds that they took, when all are done.
        """


class AtOnce:
    """For a rebalance within one step: all ranks are in the same one, and stay there until it has ended."""

    piece = None

    def met(self) -> None:
        pass

    def moved(self, num_bytes: int, seconds: float) -> None:
        pass

    def rest(self) -> None:
        pass

    def propose(self) -> int:
        return 0

    def release(self, step: int | None, commits: Sequence[Callable[[], None]] = ()) -> float:
        start = time.perf_counter()
        for commit in commits:
            commit()
        return time.perf_counter() - start


class BetweenSteps:
    """For a rebalance in a background thread, whose commits the serving thread does as it steps.

    The ranks of a model step equally often, though not at the same instant. Each proposes a step that it has
    not reached and promises to wait there; the latest of these is one that nobody has passed. A rank that
    waits at its own step can therefore still switch over with all others.

    Args:
        step: steps that this rank has ended.
        share: of a core's time that the background takes, on average.
        longest_rest: seconds that it rests between two meetings of the ranks, at most.
        lead: steps between the latest one and what is proposed: time for the ranks to agree.
    """

    piece = _PIECE

    def __init__(self, step: int, share: float = 1.0, longest_rest: float = 1.0, lead: int = 2) -> None:
        self._step = step
        self._lead = lead
        self._fence: int | None = None
        self._due: deque[tuple[int, Callable[[], None]]] = deque()
        self._seconds = 0.0
        self._error: Exception | None = None
        self._hurry = False
        self._changed = threading.Condition()
        self._rests = Rests(
            share, longest_rest, lambda: self._hurry or self._error is not None, self._changed
        )

    def met(self) -> None:
        self._rests.met()

    def moved(self, num_bytes: int, seconds: float) -> None:
        self._rests.moved(num_bytes, seconds)

    def rest(self) -> None:
        self._rests.rest()

    def propose(self) -> int:
        with self._changed:
            self._fence = self._step + self._lead
            return self._fence

    def release(self, step: int | None, commits: Sequence[Callable[[], None]] = ()) -> float:
        with self._changed:
            self._fence = None
            self._seconds = 0.0
            if step is not None:
                self._due.extend((step + after, commit) for after, commit in enumerate(commits))
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._due or self._error is not None)
            self._check()
            return self._seconds

    def fail(self, error: Exception) -> None:
        """The background cannot say whether to switch over: the serving thread must not go on either."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def step_ended(self, step: int) -> None:
        """The serving thread: `step` steps have ended. Does what is due, and waits where it has to.

        Raises:
            What was given to `fail`, or what a commit raised: this rank is then unlike the others.
        """
        with self._changed:
            self._step = step
            self._changed.wait_for(lambda: self._fence is None or self._step < self._fence or self._error)
            self._check()
            self._do_due()

    def finish(self, ended: Callable[[], bool]) -> None:
        """The serving thread: do everything at once, whatever the step, until `ended`."""
        while not ended():
            with self._changed:
                self._hurry = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._due or self._error is not None, timeout=0.01)
                self._check()
                self._do_due()

    def _do_due(self) -> None:
        while self._due and (self._hurry or self._due[0][0] <= self._step):
            start = time.perf_counter()
            try:
                self._due[0][1]()
            except Exception as error:
                self._error = error
                self._changed.notify_all()
                raise
            self._due.popleft()
            self._seconds += time.perf_counter() - start
            self._changed.notify_all()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
