"""Work in the background gives way to the threads that serve."""

from __future__ import annotations

import contextlib
import os
import sys
import threading

__all__ = ["give_way"]

_NICE = 10  # still a tenth of a core beside a thread that never rests


def give_way() -> None:
    """Let the scheduler prefer other threads to this one and to those that it starts, where cores are scarce.

    For good, since raising a priority takes privileges. Only Linux has a priority for each thread.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
