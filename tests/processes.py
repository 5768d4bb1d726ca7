"""Runs a function on several real processes joined by gloo, and never waits for them without a limit."""

from __future__ import annotations

import multiprocessing as mp
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Children of a server that has imported torch start in milliseconds instead of seconds.
_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["eplb_plugin.integration.torch_moe"])

_GRACE = 10.0  # seconds that the others get to end once a rank has failed


class RanksFailedError(AssertionError):
    """One or more ranks raised, died or ran out of time; `.failures` maps rank to what happened."""

    def __init__(self, failures: dict[int, str]) -> None:
        self.failures = failures
        super().__init__("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 90.0) -> list[Any]:
    """What `fn(rank, *args)` returned on each of `world_size` processes of a gloo group.

    Args:
        fn: a function at the top of a module; it and its result have to be picklable (no tensors out).
        world_size: processes.
        args: the same for each.
        timeout: seconds until all are killed.

    Raises:
        RanksFailedError: with the traceback of each rank that raised.
    """
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks, receivers = [], {}
        for rank in range(world_size):
            receiver, sender = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_run, args=(sender, store, rank, world_size, fn, args), daemon=True
            )
            process.start()
            sender.close()
            ranks.append(process)
            receivers[receiver] = rank
        try:
            results, failures = _collect(receivers, deadline)
        finally:
            for process in ranks:
                process.join(0.5)
                if process.is_alive():
                    process.kill()
                    process.join()
    if failures:
        raise RanksFailedError(failures)
    return [results[rank] for rank in range(world_size)]


def _collect(receivers: dict[Connection, int], deadline: float) -> tuple[dict[int, Any], dict[int, str]]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = dict(receivers)
    while waiting:
        left = deadline - time.monotonic()
        if left <= 0:
            failures.update(dict.fromkeys(waiting.values(), "still running at the time limit"))
            break
        for receiver in wait(list(waiting), timeout=left):
            rank = waiting.pop(receiver)
            try:
                ok, value = receiver.recv()
            except EOFError:
                ok, value = False, "died without a word"
            if ok:
                results[rank] = value
            else:
                failures[rank] = value
                deadline = min(deadline, time.monotonic() + _GRACE)
    for receiver in receivers:
        receiver.close()
    return results, failures


def _run(
    sender: Connection, store: str, rank: int, world_size: int, fn: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size
        )
        result = fn(rank, *args)
        dist.barrier()
        dist.destroy_process_group()
        sender.send((True, result))
    except BaseException:
        sender.send((False, traceback.format_exc()))
