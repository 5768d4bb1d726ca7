"""NCCL for the balancer alone: connected from the start, and given up without ending the process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from ...core.errors import RankLostError
from ..control.rank_group import AnyGroup, answered
from ..control.two_phase_commit import Store

__all__ = ["abort_nccl", "join_nccl", "within_limit"]

_T = TypeVar("_T")

# Who waits for a message is told what became of it. Otherwise a watchdog of torch's would end the process
# where a connection breaks or a message is late, and have all other ranks end theirs.
_SETTINGS = {"TORCH_NCCL_BLOCKING_WAIT": "1"}


def join_nccl(store: Store, rank: int, size: int, device: torch.device, time_limit: float) -> AnyGroup:
    """A communicator that all ranks have used together, so that some of them may be the next to.

    NCCL connects when it is first used, and waits for every rank then, also for those that have nothing to
    send or receive.

    Args:
        store: where the ranks meet.
        rank, size: of the group.
        device: the GPU of this rank.
        time_limit: seconds, for joining and for whatever is waited for later.

    Raises:
        RankLostError: a rank does not answer.
    """

    def join() -> AnyGroup:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=time_limit)
        with _environment(_SETTINGS):
            group: AnyGroup = dist.ProcessGroupNCCL(store, rank, size, options)
        here = torch.ones(1, device=device)
        answered("joining over NCCL", lambda: group.allreduce([here]).wait())
        return group

    try:
        return within_limit(join, device, time_limit)
    except TimeoutError as error:
        raise RankLostError(
            f"joining over NCCL: no answer from another rank within {time_limit} s"
        ) from error


def abort_nccl(group: AnyGroup, time_limit: float) -> None:
    """End what is under way on the GPU, which would wait for a peer for ever; and the communicator."""

    def abort() -> None:
        with suppress(RuntimeError):
            group.abort()

    aborting = threading.Thread(target=abort, daemon=True)
    aborting.start()
    aborting.join(time_limit)


def within_limit(action: Callable[[], _T], device: torch.device, time_limit: float) -> _T:
    """What `action` gives or raises, on the current stream. To connect to a peer, NCCL waits for it in the
    call that sends it the first message, without a limit.

    Raises:
        TimeoutError: it takes longer, and goes on in a thread of its own.
    """
    stream = torch.cuda.current_stream(device)
    given: list[_T] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            # Both belong to a thread.
            with torch.cuda.device(device), torch.cuda.stream(stream):
                given.append(action())
        except Exception as error:  # every kind, for the thread that waits
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(time_limit)
    if failed:
        raise failed[0]
    if not given:
        raise TimeoutError
    return given[0]


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    """Torch reads these when a group is made, and knows no other way to set them for that group."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
