"""Running SGLang in a process group of its own, with a limit on its time and nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.engines.forked import run_forked

ROOT = Path(__file__).resolve().parents[3]
LIMIT = 400  # seconds of one engine, start included; many times what it takes
SMALL_ENGINE = {
    "device": "cpu",
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "skip_server_warmup": True,
    "attention_backend": "torch_native",
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "disable_radix_cache": True,
    "max_total_tokens": 2048,
    "max_running_requests": 8,
    "mem_fraction_static": 0.3,
}
REBALANCE = re.compile(r"rebalance (\d+): (?:balancedness .*?; (\d+) moves in|((?:skipped|failed), .*))")


class EngineLog:
    """What an SGLang has written."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def rebalances(self) -> list[tuple[int, str]]:
        """(moves, why the map stayed) of each rebalance that the plugin has logged so far."""
        return [(int(moves or 0), kept or "") for _, moves, kept in REBALANCE.findall(self.text())]

    def tail(self) -> str:
        """The end of the log, without the many models that this environment lacks something for."""
        lines = [line for line in self.text().splitlines() if "Ignore import error" not in line]
        return "\n".join(lines[-60:])


class EngineProcess(EngineLog):
    """A running SGLang. Use `started`."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        super().__init__(log)
        self.process = process


def run(function: Callable[..., None], *args: Any, log: Path, env: Mapping[str, str]) -> EngineLog:
    """Run the function to its end in a process that has imported SGLang; see `forked`."""
    status = run_forked(function, *args, log=log, env={**os.environ, **env}, limit=LIMIT)
    written = EngineLog(log)
    assert status is not None, f"still running after {LIMIT} s\n{written.tail()}"
    assert status == 0, written.tail()
    return written


@contextmanager
def started(
    command: Sequence[str], log: Path, env: Mapping[str, str] | None = None
) -> Iterator[EngineProcess]:
    """Run `python COMMAND`. At the end all of its process group is killed, whatever happened."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield EngineProcess(process, log)
    finally:
        _kill_group(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the group's processes and wait until they are gone, so that memory and ports are free again."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        process.poll()
        time.sleep(0.05)
    raise AssertionError(f"processes of group {process.pid} survive SIGKILL")
