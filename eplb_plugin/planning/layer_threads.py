"""Compiled kernels over layers, on a few threads of our own.

Numba's own threading layers are avoided on purpose: workqueue does not allow several threads to start work,
GNU OpenMP does not survive a fork, and engines do both.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

__all__ = ["WORTH_THREADS_TO_SUM", "over_layers"]

_MAX_THREADS = 8
_CHUNKS_PER_THREAD = 16  # layers differ in effort; small chunks even that out
# Loads below which starting a thread costs more than it saves: in searches, and in passes that only add up.
WORTH_THREADS = 4096
WORTH_THREADS_TO_SUM = 1 << 18


def over_layers(work: Any, weight: torch.Tensor, worth_threads: int = WORTH_THREADS) -> None:
    """Call `work(first, last)` for chunks of the layers, on one thread for fewer than `worth_threads` loads.

    Layers are independent, so order does not matter.
    """
    num_layers = weight.shape[1]
    threads = min(_MAX_THREADS, _usable_cores(), num_layers)
    if threading.current_thread() is not threading.main_thread():
        # Planning in the background: the engine's own thread keeps a core.
        threads = max(1, threads - 1)
    if threads == 1 or weight.numel() < worth_threads:
        work(0, num_layers)
        return
    size = -(-num_layers // (threads * _CHUNKS_PER_THREAD))
    chunks = iter([(at, min(at + size, num_layers)) for at in range(0, num_layers, size)])

    def drain() -> None:
        # Taking the next item of a list iterator is one step of the interpreter, hence safe.
        for first, last in chunks:
            work(first, last)

    # A pool per call: a process that forks later does not inherit a pool whose threads are gone.
    with ThreadPoolExecutor(threads - 1, thread_name_prefix="eplb-plan") as pool:
        others = [pool.submit(drain) for _ in range(threads - 1)]
        drain()
        for other in others:
            other.result()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
