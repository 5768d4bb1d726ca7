"""Transport of expert weights between ranks: contiguous tensors, over gloo on CPUs and over NCCL on GPUs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ...core.errors import RankLostError
from ..control.rank_group import AnyGroup, RankGroup, answered
from ..control.two_phase_commit import Store

__all__ = ["InFlight", "Message", "Transport", "join_nccl"]

_T = TypeVar("_T")

# NCCL splits a long group of messages into several launches, at another message on each rank. Ranks may then
# wait for each other for ever (pytorch issue 174288, sglang pull request 30829: from some hundreds on).
_MOST_IN_A_GROUP = 64
_WHAT = "moving expert weights"

# The caller of `wait` gets the error of a broken connection or a late message. Without this setting torch's
# watchdog ends the process instead, and all other ranks end theirs.
_BLOCKING_WAIT = "TORCH_NCCL_BLOCKING_WAIT"


@dataclass(frozen=True, eq=False)
class Message:
    """One contiguous tensor to or from another rank."""

    rank: int
    tensor: torch.Tensor


class InFlight:
    """Messages on their way."""

    def __init__(self, works: Sequence[Any] = ()) -> None:
        self._works = list(works)
        self._done = 0

    def wait(self, count: int | None = None) -> None:
        """Wait for the first `count` messages, receives before sends; None is all. NCCL: always all.

        Raises:
            RankLostError: a peer does not answer.
        """

        def run() -> None:
            # A second wait for the same work would wait for a second message.
            for work in self._works[self._done : count]:
                work.wait()
                self._done += 1

        answered(_WHAT, run)


class Transport:
    """Point-to-point messages of one group.

    Over gloo each direction between two ranks has a group of its own. Two threads then send and receive, a
    tenth faster than one connection, also with few cores.

    Args:
        upward: the rank's group, for messages to higher ranks.
        downward: the group for messages to lower ranks; None is the same group.
        time_limit: seconds to start messages on a GPU.

    Attributes:
        max_messages: most messages of one direction in a round, all started by one call; None is no limit.
    """

    def __init__(
        self, upward: RankGroup, downward: AnyGroup | None = None, *, time_limit: float = 30.0
    ) -> None:
        self.device = upward.device
        self.max_messages = None if self.device.type == "cpu" else _MOST_IN_A_GROUP
        self._rank, self._size = upward.rank, upward.size
        self._upward: AnyGroup | None = upward.group
        self._downward: AnyGroup | None = downward if downward is not None else upward.group
        self._time_limit = time_limit

    def start(self, sends: Sequence[Message], receives: Sequence[Message]) -> InFlight:
        """Start to send and receive. The tensors stay as they are until `wait` has returned.

        Messages between two ranks match by their order. Both ranks of each message call; others need not.

        Raises:
            RankLostError: the connections are closed on either end; on a GPU also, a peer does not answer.
        """
        if self._size == 1 or not (sends or receives):
            return InFlight()
        up, down = self._upward, self._downward
        if up is None or down is None:
            raise RankLostError("the connections to the other ranks are closed")

        def run() -> list[Any]:
            works = []
            for at in receives:
                works.append((down if at.rank > self._rank else up).recv([at.tensor], at.rank, 0))
            for to in sends:
                works.append((up if to.rank > self._rank else down).send([to.tensor], to.rank, 0))
            return works

        def run_as_group() -> list[Any]:
            up._start_coalescing()
            run()
            return [up._end_coalescing()]

        if self.max_messages is None:
            return InFlight(answered(_WHAT, run))
        try:
            works = _within(self._time_limit, self.device, partial(answered, _WHAT, run_as_group))
        except TimeoutError as error:
            self.close()
            raise RankLostError(
                f"{_WHAT}: no answer from another rank within {self._time_limit} s"
            ) from error
        return InFlight(works)

    def close(self) -> None:
        """Give the groups back; ranks that still expect a message get an error."""
        group, self._upward, self._downward = self._upward, None, None
        if group is not None and self.max_messages is not None and self._size > 1:
            # Its kernels on the GPU would wait for a lost peer for ever.
            with suppress(RuntimeError, TimeoutError):
                _within(self._time_limit, self.device, group.abort)


def join_nccl(store: Store, rank: int, size: int, device: torch.device, time_limit: float) -> AnyGroup:
    """A connected NCCL communicator. All ranks call it together.

    NCCL connects at the first use, and then waits for every rank. A first all-reduce does that here, so that
    later messages wait for their two ranks only. `time_limit`: seconds, for joining and for every later wait.

    Raises:
        RankLostError: a rank does not answer.
    """

    def join() -> AnyGroup:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=time_limit)
        with _blocking_wait():
            group: AnyGroup = dist.ProcessGroupNCCL(store, rank, size, options)
        here = torch.ones(1, device=device)
        answered("joining over NCCL", lambda: group.allreduce([here]).wait())
        return group

    try:
        return _within(time_limit, device, join)
    except TimeoutError as error:
        raise RankLostError(
            f"joining over NCCL: no answer from another rank within {time_limit} s"
        ) from error


def _within(time_limit: float, device: torch.device, action: Callable[[], _T]) -> _T:
    """The result of `action`, on the current stream. The first message to a peer blocks in NCCL's call until
    the peer connects, without a limit.

    Raises:
        TimeoutError: it takes longer, and goes on in a thread of its own. Any error of `action`.
    """
    stream = torch.cuda.current_stream(device)
    results: list[_T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            # The current device and stream belong to a thread.
            with torch.cuda.device(device), torch.cuda.stream(stream):
                results.append(action())
        except Exception as error:  # every kind, for the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(time_limit)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError
    return results[0]


@contextmanager
def _blocking_wait() -> Iterator[None]:
    """Set `_BLOCKING_WAIT` for one call: torch reads settings of a new group from the environment only."""
    before = os.environ.get(_BLOCKING_WAIT)
    os.environ[_BLOCKING_WAIT] = "1"
    try:
        yield
    finally:
        del os.environ[_BLOCKING_WAIT]
        if before is not None:
            os.environ[_BLOCKING_WAIT] = before
