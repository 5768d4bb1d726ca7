"""Compiled kernels over layers, on a few threads.

Numba's own threading layers do not serve: workqueue does not allow several threads to start work, GNU OpenMP
does not survive a fork, and engines do both.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

__all__ = ["WORTH_THREADS_TO_SUM", "over_layers"]

_MAX_THREADS = 8
_CHUNKS_PER_THREAD = 16  # layers differ in effort; small chunks even that out
# With fewer loads, starting a thread costs more than it saves: in a search, and in a pass of sums.
_WORTH_THREADS = 4096
WORTH_THREADS_TO_SUM = 1 << 18


def over_layers(
    work: Callable[[int, int], object], weight: torch.Tensor, worth_threads: int = _WORTH_THREADS
) -> None:
    """Call `work(first, last)` for chunks of the layers `first..last-1`, in any order.

    Args:
        weight: [snapshots, layers, logical]; with fewer than `worth_threads` loads, one thread does it all.
    """
    num_layers = weight.shape[1]
    threads = min(_MAX_THREADS, _usable_cores(), num_layers)
    if threading.current_thread() is not threading.main_thread():
        # In the background, the engine's own thread keeps a core.
        threads = max(1, threads - 1)
    if threads == 1 or weight.numel() < worth_threads:
        work(0, num_layers)
        return
    size = -(-num_layers // (threads * _CHUNKS_PER_THREAD))
    chunks = iter([(at, min(at + size, num_layers)) for at in range(0, num_layers, size)])

    def drain() -> None:
        # Taking the next item of a list iterator is one step of the interpreter, hence thread-safe.
        for first, last in chunks:
            work(first, last)

    # One pool a call: after a later fork, a kept pool would have lost its threads.
    with ThreadPoolExecutor(threads - 1, thread_name_prefix="eplb-plan") as pool:
        others = [pool.submit(drain) for _ in range(threads - 1)]
        drain()
        for other in others:
            other.result()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
