"""Output of several commands: counted words, the size of a load, progress, the wait for compilation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..core.topology import Topology
from ..formats.recordings import Recording
from ..offline.traces import LoadTrace

__all__ = ["compiling", "counted", "progress_bar", "size_in", "size_of", "tell_left_out"]

_PATIENCE = 5.0
"""Seconds until the line on an output without a terminal."""


def counted(number: int, word: str) -> str:
    """`1 step`, `2 steps`; the plural must end in s."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def size_of(load: LoadTrace) -> str:
    """For example `40 steps, 2 layers, 32 experts`."""
    counts = {"layer": load.num_layers, "expert": load.num_experts}
    return ", ".join([load.length, *(counted(number, word) for word, number in counts.items())])


def size_in(load: LoadTrace, topology: Topology) -> str:
    """For example `40 steps, 2 layers, 32 experts in 40 slots on 8 ranks`."""
    slots, ranks = counted(topology.num_slots, "slot"), counted(topology.num_ranks, "rank")
    return f"{size_of(load)} in {slots} on {ranks}"


def tell_left_out(console: Console, source: str, recording: Recording | None) -> None:
    """Print one line for each kind of files that a recording was read without.

    Args:
        console: of standard error.
        source: the folder.
        recording: what was read; None: another load.
    """
    for sentence in () if recording is None else recording.left_out:
        console.print(f"{source}: {sentence}", highlight=False, markup=False, soft_wrap=True)


def progress_bar(console: Console) -> Progress:
    """A progress bar with a description, done of all, and the time; it disappears at the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


@contextmanager
def compiling(console: Console, doing: str) -> Iterator[None]:
    """Tell the user about the first compilation of the planner, which takes over a minute.

    A terminal shows a status at once. Another output gets one line, after `_PATIENCE` seconds.

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
