"""One process for each rank on this machine, joined by gloo; every wait has a time limit."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...core.errors import EplbError

__all__ = ["RankError", "run_ranks"]

# Seconds for the reports of the other ranks after a failure. The reports tell the dead rank from ranks that
# only lost their connection to it.
_GRACE = 3.0


class RankError(EplbError, RuntimeError):
    """A rank raised or died, or no rank sent a message within the time limit; all ranks were stopped."""


@dataclass(frozen=True)
class _Ended:
    """The last message of a rank: the traceback of its failure, or None."""

    failure: str | None


def run_ranks(
    body: Callable[..., None], num_ranks: int, args: tuple[Any, ...], *, time_limit: float
) -> Iterator[tuple[int, Any]]:
    """Run `body(rank, send, *args)` in `num_ranks` processes joined by gloo.

    Args:
        body: a function at the top level of a module; `send` takes its messages.
        num_ranks: number of processes.
        args: picklable arguments, the same for each rank.
        time_limit: maximum seconds between two messages of any rank, and of a collective operation.

    Yields:
        (rank, message) in order of arrival. After the last one, all processes have ended.

    Raises:
        RankError: names the failed ranks and their failures.
    """
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = []
    receivers: dict[Connection, int] = {}
    timeout = datetime.timedelta(seconds=time_limit)
    with tempfile.TemporaryDirectory(prefix="eplb-plugin-") as folder:
        store = str(Path(folder) / "store")
        try:
            for rank in range(num_ranks):
                receiver, sender = context.Pipe(duplex=False)
                receivers[receiver] = rank
                group = {"rank": rank, "world_size": num_ranks, "timeout": timeout}
                process: BaseProcess = context.Process(
                    target=_enter, args=(sender, store, group, body, args), daemon=True
                )
                process.start()
                processes.append(process)
                # With the child as its only holder, the pipe ends when the child dies.
                sender.close()
            yield from _messages(receivers, processes, time_limit)
        finally:
            for process in processes:
                process.join(0.5)
                if process.is_alive():
                    process.kill()
                    process.join()
            for receiver in receivers:
                receiver.close()


def _messages(
    receivers: dict[Connection, int], processes: list[BaseProcess], time_limit: float
) -> Iterator[tuple[int, Any]]:
    waiting = dict(receivers)
    died: dict[int, str] = {}
    raised: dict[int, str] = {}
    end_of_grace = None
    while waiting:
        left = time_limit if end_of_grace is None else max(0.0, end_of_grace - time.monotonic())
        ready = wait(list(waiting), timeout=left)
        if not ready:
            break
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = waiting[receiver]
            try:
                message = receiver.recv()
            except (EOFError, OSError):
                processes[rank].join(1)
                died[rank] = f"rank {rank} died with exit code {processes[rank].exitcode}"
                message = _Ended(died[rank])
            if not isinstance(message, _Ended):
                yield rank, message
                continue
            del waiting[receiver]
            if message.failure is not None:
                end_of_grace = end_of_grace or time.monotonic() + _GRACE
                if rank not in died:
                    raised[rank] = f"rank {rank} failed: {message.failure.strip().splitlines()[-1]}"
    if died or raised:
        raise RankError("; ".join([*died.values(), *raised.values()]))
    if waiting:
        raise RankError(
            f"ranks {sorted(waiting.values())} were still running, but none had got any further for "
            f"{time_limit:g} s (demo.time_limit)"
        )


def _enter(
    sender: Connection, store: str, group: dict[str, Any], body: Callable[..., None], args: tuple[Any, ...]
) -> None:
    # All ranks share the cores and the loopback of this machine.
    torch.set_num_threads(1)
    if any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        file = dist.FileStore(store, group["world_size"])  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=file, **group)
        body(group["rank"], sender.send, *args)
        dist.barrier()
        dist.destroy_process_group()
        sender.send(_Ended(None))
    except BaseException:
        sender.send(_Ended(traceback.format_exc()))
