"""Rests of the background between pieces of work, so that no step pays for more than a small piece."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["Rests"]

_SHORTEST = 0.005  # seconds


class Rests:
    """Keeps the background to a share of a core's time: after each piece it rests for as long as that takes.

    Priorities alone do not do where serving threads keep all cores busy: they wait for each other now and
    then, and whatever the background computes at those moments delays the step that follows.

    Args:
        share: of a core's time, in 0..1; 1 is no rests.
        at_most: seconds of rest between two meetings of the ranks, since those who are there wait.
        over: whether there is no time to rest any more; whoever changes that notifies `changed`.
        changed: what to wait on.
    """

    def __init__(
        self, share: float, at_most: float, over: Callable[[], bool], changed: threading.Condition
    ) -> None:
        self._share = share
        self._at_most = self._left = at_most
        self._over = over
        self._changed = changed
        self._since: float | None = None
        self._carried = 0.0
        self._rate = 0.0  # bytes per second, the best that was seen

    def met(self) -> None:
        """All ranks have just met."""
        self._left = self._at_most

    def moved(self, num_bytes: int, seconds: float) -> None:
        """Messages were sent and received, which is the work of other threads than this one.

        The fastest of them tells what that costs: others may have had to wait for a peer.
        """
        if num_bytes:
            self._rate = max(self._rate, num_bytes / max(seconds, 1e-9))
            self._carried += num_bytes / self._rate

    def rest(self) -> None:
        """After a piece of work of this thread, and at its start."""
        if self._share >= 1:
            return
        now = time.thread_time()
        if self._since is None:
            self._since = now
        used = now - self._since + self._carried
        wanted = used * (1 / self._share - 1)
        # Shorter ones are not worth a switch to another thread and back.
        if wanted < _SHORTEST or self._left <= 0:
            return
        start = time.perf_counter()
        with self._changed:
            self._changed.wait_for(self._over, timeout=min(wanted, self._left))
        self._left -= time.perf_counter() - start
        self._since, self._carried = time.thread_time(), 0.0
