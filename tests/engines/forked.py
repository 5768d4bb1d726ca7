"""Runs an engine in a process that is forked from one that has imported it, which takes many seconds."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")


def preload(*modules: str) -> None:
    """What is imported before the first fork."""
    _context.set_forkserver_preload(list(modules))


def run_forked(
    function: Callable[..., Any], *args: Any, log: Path, env: Mapping[str, str], limit: float
) -> int | None:
    """The exit status of `function(*args)`, with its output in `log`; None when it ran out of time.

    It is in a process group of its own, which is killed in the end. The function is at the top of a module.
    """
    process = _context.Process(target=_enter, args=(function, args, log, dict(env)))
    process.start()
    try:
        process.join(limit)
        return process.exitcode
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # Before it has a group of its own, there is only this.
        process.kill()
        process.join()


def _enter(function: Callable[..., Any], args: Any, log: Path, env: dict[str, str]) -> None:
    os.setsid()
    with log.open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.clear()
    os.environ.update(env)
    function(*args)
