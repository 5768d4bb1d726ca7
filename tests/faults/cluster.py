"""Real processes joined by gloo that may be killed or stopped, and a launcher that outlasts any of it."""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing as mp
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from tests.processes import RanksFailedError

StoreKind = Literal["file", "tcp"]

# Children of a server that has compiled the planner already start in milliseconds, on any machine.
_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["tests.faults.preload"])

_GRACE = 10.0  # seconds that the others get to end once a rank has failed
_DUMP = 2.0  # seconds to write tracebacks
_ENGINE_LIMIT = timedelta(seconds=60)  # of the group that the model itself talks over


@dataclass
class Seat:
    """What a process of a cluster is given.

    Attributes:
        folder: the same for all of them.
        logged: errors that the package logged here.
    """

    rank: int
    size: int
    folder: Path
    sender: Connection | None = None
    logged: list[str] = field(default_factory=list)

    def die(self) -> None:
        """SIGKILL, here and now."""
        self.mark("fault")
        os.kill(os.getpid(), signal.SIGKILL)

    def stop(self, seconds: float) -> None:
        """SIGSTOP, here and now; the launcher sends SIGCONT after `seconds`."""
        assert self.sender is not None
        self.mark("fault")
        self.sender.send(("stop", seconds))
        # To this thread, which therefore does not get a single instruction further.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)

    def mark(self, name: str) -> None:
        """Leave the time for all to see."""
        written = self.folder / f"{name}.{self.rank}"
        written.write_text(repr(time.monotonic()))
        written.rename(self.folder / name)

    def marked(self, name: str) -> float | None:
        """When `name` was marked, on the clock that all processes share."""
        path = self.folder / name
        return float(path.read_text()) if path.exists() else None

    def forget(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)


def run_cluster(
    fn: Callable[..., Any],
    size: int,
    *args: Any,
    limit: float = 90.0,
    dies: Collection[int] = (),
    store: StoreKind = "file",
) -> list[Any]:
    """What `fn(seat, *args)` returned on each of `size` processes; None for those that died as they should.

    Args:
        fn: a function at the top of a module; it and its result can be pickled.
        size: processes.
        args: the same for each.
        limit: seconds until all are killed, and said to hang, with the traceback of every thread.
        dies: ranks that have to kill themselves.
        store: a file, or a server that rank 0 hosts.

    Raises:
        RanksFailedError: a rank raised, hung, died, or did not die.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes: list[Any] = []
        receivers: dict[Connection, int] = {}
        for rank in range(size):
            receiver, sender = _context.Pipe(duplex=False)
            seat = Seat(rank, size, folder, sender)
            process = _context.Process(target=_run, args=(seat, store, fn, args), daemon=True)
            process.start()
            sender.close()
            processes.append(process)
            receivers[receiver] = rank
        try:
            results, failures = _watch(processes, receivers, time.monotonic() + limit, set(dies), folder)
        finally:
            for process in processes:
                process.kill()
                process.join()
            for receiver in receivers:
                receiver.close()
    if failures:
        raise RanksFailedError(failures)
    return [results[rank] for rank in range(size)]


def hear_errors(seat: Seat) -> None:
    """Keep the errors that the package logs."""
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: seat.logged.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("eplb_plugin")
    logger.addHandler(handler)
    logger.propagate = False


def _watch(
    processes: list[Any], receivers: dict[Connection, int], deadline: float, dies: set[int], folder: Path
) -> tuple[dict[int, Any], dict[int, str]]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting, wakes = dict(receivers), dict[int, float]()
    while waiting:
        now = time.monotonic()
        for rank in [rank for rank, due in wakes.items() if due <= now]:
            if _state(processes[rank].pid) == "T":
                os.kill(processes[rank].pid, signal.SIGCONT)
                del wakes[rank]
        if now >= deadline:
            for rank, text in _traces(processes, set(waiting.values()), folder).items():
                failures.setdefault(rank, f"still running at the time limit\n{text}")
            break
        for receiver in wait(list(waiting), timeout=min(0.02 if wakes else 0.5, deadline - now)):
            rank = waiting[receiver]
            try:
                kind, value = receiver.recv()
            except EOFError:
                kind, value = ("done", None) if rank in dies else ("failed", "died without a word")
            if kind == "stop":
                wakes[rank] = time.monotonic() + value
                continue
            del waiting[receiver]
            if kind == "done" and value is None and rank in dies:
                results[rank] = None
            elif kind == "done" and rank not in dies:
                results[rank] = value
            else:
                failures[rank] = value if kind == "failed" else "was to die and did not"
                deadline = min(deadline, time.monotonic() + _GRACE)
    return results, failures


def _state(pid: int) -> str:
    """One letter: T is stopped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


def _traces(processes: list[Any], ranks: set[int], folder: Path) -> dict[int, str]:
    """Where each thread of `ranks` is."""
    for rank in ranks:
        if processes[rank].is_alive():
            os.kill(processes[rank].pid, signal.SIGCONT)
            os.kill(processes[rank].pid, signal.SIGUSR1)
    time.sleep(_DUMP)
    paths = {rank: folder / f"trace.{rank}" for rank in ranks}
    return {rank: path.read_text() if path.exists() else "" for rank, path in paths.items()}


def _run(seat: Seat, store: StoreKind, fn: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    # Written by the C library's handler: that works in a process whose interpreter is stuck as well.
    faulthandler.register(signal.SIGUSR1, file=(seat.folder / f"trace.{seat.rank}").open("w"))
    hear_errors(seat)
    assert seat.sender is not None
    try:
        dist.init_process_group(
            "gloo", store=_open(seat, store), rank=seat.rank, world_size=seat.size, timeout=_ENGINE_LIMIT
        )
        seat.sender.send(("done", fn(seat, *args)))
    except BaseException:
        seat.sender.send(("failed", traceback.format_exc()))
    # A process that ends closes its connections, and others may not have read all of them yet.
    threading.Event().wait()


def _open(seat: Seat, kind: StoreKind) -> Any:
    if kind == "file":
        return dist.FileStore(str(seat.folder / "store"), seat.size)
    path = seat.folder / "port"
    if seat.rank == 0:
        hosted = dist.TCPStore("127.0.0.1", 0, seat.size, is_master=True, wait_for_workers=False)
        (seat.folder / "port.new").write_text(str(hosted.port))
        (seat.folder / "port.new").rename(path)
        return hosted
    while not path.exists():
        time.sleep(0.01)
    return dist.TCPStore("127.0.0.1", int(path.read_text()), seat.size, is_master=False)
