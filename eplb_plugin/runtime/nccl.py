"""NCCL for the balancer alone: connected from the start, and given up without ending the process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from ..errors import RankLostError
from .collectives import AnyGroup, answered
from .decisions import Store
from .streams import DeviceOrder

__all__ = ["join_nccl"]

# Whoever waits for NCCL has a limit of its own, see `DeviceOrder.settle`. Torch's watchdog waits longer; by
# default it would then end the process, or where a connection breaks, and have all other ranks end theirs.
_WATCHDOG_LIMITS = 4
_WATCHDOG = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}


def join_nccl(store: Store, rank: int, size: int, device: torch.device, time_limit: float) -> AnyGroup:
    """A communicator that has been used by all ranks together: some of them may be the next to.

    NCCL connects when it is first used, and waits for every rank then, also for those that have nothing to
    send or receive.

    Args:
        store: where the ranks meet.
        rank, size: of the group.
        device: the GPU of this rank.
        time_limit: seconds.

    Raises:
        RankLostError: a rank does not answer.
    """
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=_WATCHDOG_LIMITS * time_limit)
    with torch.cuda.device(device):
        with _environment(_WATCHDOG):
            group: AnyGroup = dist.ProcessGroupNCCL(store, rank, size, options)
        order = DeviceOrder(device)
        with order.background():
            here = torch.ones(1, device=device)
            answered("joining", lambda: group.allreduce([here]).wait())
            if not order.settle(time_limit):
                group.abort()
                raise RankLostError(f"joining: a rank did not answer within {time_limit} s over NCCL")
    return group


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
