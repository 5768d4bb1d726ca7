"""Keeping the background out of the way of the threads that serve: pauses, and a lower priority."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time

__all__ = ["Throttle", "lower_priority"]

_NICE = 10  # still a tenth of a core beside a thread that never waits
_SHORTEST = 0.005  # seconds; a shorter pause is not worth two context switches


class Throttle:
    """Limits the background to a share of one core: after each piece of work it pauses in proportion.

    With `share=0.05`, 10 ms of work are followed by a pause of 190 ms. Priorities alone are not enough on
    busy cores: serving threads wait for each other now and then, and the background then delays the next
    step.

    Args:
        share: fraction of one core's time, above 0, at most 1; 1 never pauses.
        longest: seconds of pause between two collectives, since the other ranks wait there.
    """

    def __init__(self, share: float, longest: float) -> None:
        self._share = share
        self._longest = self._left = longest
        self._lifted = threading.Event()
        self._since: float | None = None  # thread time at the end of the last pause
        self._transfer_seconds = 0.0  # since then
        self._bandwidth = 0.0  # bytes per second, the highest so far

    def ranks_met(self) -> None:
        """All ranks have just met in a collective: the bound on pauses counts anew."""
        self._left = self._longest

    def count_transfer(self, num_bytes: int, seconds: float) -> None:
        """Count messages as work, though other threads carry them.

        Their cost is estimated by the highest bandwidth so far, since slower ones may have waited for a peer.
        """
        if num_bytes:
            self._bandwidth = max(self._bandwidth, num_bytes / max(seconds, 1e-9))
            self._transfer_seconds += num_bytes / self._bandwidth

    def pause(self) -> None:
        """Pause for the work of this thread since the last pause. The first call starts the count."""
        if self._share >= 1:
            return
        now = time.thread_time()
        if self._since is None:
            self._since = now
        used = now - self._since + self._transfer_seconds
        wanted = used * (1 / self._share - 1)
        if wanted < _SHORTEST or self._left <= 0:
            return
        start = time.perf_counter()
        self._lifted.wait(min(wanted, self._left))
        self._left -= time.perf_counter() - start
        self._since, self._transfer_seconds = time.thread_time(), 0.0

    def lift(self) -> None:
        """End the current pause and all later ones: somebody waits for the background."""
        self._lifted.set()


def lower_priority() -> None:
    """Let the operating system prefer other threads to this one and to those that it starts.

    It is permanent, since raising a priority takes privileges. Only Linux has a priority for each thread.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
