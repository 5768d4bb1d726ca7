"""Output that several commands share: counted words, and a sign of life while kernels are compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

from rich.console import Console

__all__ = ["compiling", "counted"]

_PATIENCE = 5.0
"""Seconds of silence before the line on an output that is no terminal."""


def counted(number: int, word: str) -> str:
    """`1 step`, `2 steps`; for words whose plural ends in s."""
    return f"{number} {word}{'' if number == 1 else 's'}"


@contextmanager
def compiling(console: Console, doing: str) -> Iterator[None]:
    """Show progress while the block loads the planner, which is compiled the first time: over a minute.

    A terminal shows a status at once. Any other output gets one line, and only after `_PATIENCE` seconds.

    Args:
        console: of standard error.
        doing: text of the status.
    """
    if console.is_terminal:
        with console.status(f"{doing} (the first time, the planner is compiled)"):
            yield
        return
    told = "loading the planner; the first time it is compiled, which can take over a minute"
    timer = Timer(_PATIENCE, console.print, [told], {"highlight": False, "soft_wrap": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
