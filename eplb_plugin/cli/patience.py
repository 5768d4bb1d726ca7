"""What is shown while the planner is loaded, which takes over a minute where it has to be compiled first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

from rich.console import Console

__all__ = ["compiling"]

_PATIENCE = 5.0
"""Seconds of silence before a line is written where no terminal could show that something goes on."""


@contextmanager
def compiling(console: Console, doing: str) -> Iterator[None]:
    """Show what is going on while the block runs: on a terminal at once and until it ends, elsewhere by one
    line, and only if it takes longer than loading a compiled planner does.

    Args:
        console: of standard error.
        doing: what the block does, for terminals.
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
