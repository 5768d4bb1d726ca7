"""Expert weights on their way: contiguous tensors from rank to rank, many at once and in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ...core.errors import RankLostError
from ..control.rank_group import AnyGroup, RankGroup, answered
from .nccl import abort_nccl, within_limit

__all__ = ["InFlight", "Message", "Transport"]

# NCCL cuts what is started by one call into as many launches as it takes, each rank where its own budget is
# used up, and ranks may then wait for each other for ever: seen by others from some hundreds of messages on
# (pytorch issue 174288, sglang pull request 30829).
_MOST_AT_ONCE = 64
_WHAT = "moving expert weights"


@dataclass(frozen=True, eq=False)
class Message:
    """One contiguous tensor to or from another rank."""

    rank: int
    tensor: torch.Tensor


class InFlight:
    """Messages that were started and have not all arrived."""

    def __init__(self, works: Sequence[Any] = ()) -> None:
        self._works = list(works)
        self._done = 0

    def wait(self, count: int | None = None) -> None:
        """Until the first `count` of them have arrived, receives before sends, and more where they were
        started by one call; None is all. RankLostError: a peer does not answer."""

        def run() -> None:
            # A work that is waited for twice waits for a second message.
            for work in self._works[self._done : count]:
                work.wait()
                self._done += 1

        answered(_WHAT, run)


class Transport:
    """What messages travel over.

    Over gloo each direction between two ranks has a group of its own, so that sending and receiving are the
    work of different threads: by a tenth faster than both on one connection, even where cores are scarce.

    Args:
        upward: the rank's group, which carries messages to higher ranks.
        downward: what carries those to lower ranks; None is the same group.
        time_limit: seconds that starting messages on a GPU may take.

    Attributes:
        most: messages of a direction that a round may have, since all of a round have to be started by one
            call; None is any number.
    """

    def __init__(
        self, upward: RankGroup, downward: AnyGroup | None = None, *, time_limit: float = 30.0
    ) -> None:
        self.device = upward.device
        self.most = None if self.device.type == "cpu" else _MOST_AT_ONCE
        self._rank, self._size = upward.rank, upward.size
        self._upward: AnyGroup | None = upward.group
        self._downward: AnyGroup | None = downward if downward is not None else upward.group
        self._time_limit = time_limit

    def start(self, sends: Sequence[Message], receives: Sequence[Message]) -> InFlight:
        """Send to some ranks and receive from others. The tensors stay as they are until `wait` has returned.

        Messages between two ranks match by their order. Every rank that is sent to has to receive, and the
        other way round; ranks that have nothing to do with each other need not call.

        Raises:
            RankLostError: the connections are closed, or a peer's end of them is; or, on a GPU, a peer does
                not answer.
        """
        if self._size == 1 or not (sends or receives):
            return InFlight()
        up, down = self._upward, self._downward
        if up is None or down is None:
            raise RankLostError("the connections to the other ranks are closed")

        def run() -> list[Any]:
            if self.most is not None:
                up._start_coalescing()
            works = [
                (down if message.rank > self._rank else up).recv([message.tensor], message.rank, 0)
                for message in receives
            ]
            works += [
                (up if message.rank > self._rank else down).send([message.tensor], message.rank, 0)
                for message in sends
            ]
            return works if self.most is None else [up._end_coalescing()]

        if self.most is None:
            return InFlight(answered(_WHAT, run))
        try:
            return InFlight(within_limit(partial(answered, _WHAT, run), self.device, self._time_limit))
        except TimeoutError as error:
            self.close()
            limit = f"within {self._time_limit} s"
            raise RankLostError(f"{_WHAT}: no answer from another rank {limit}") from error

    def close(self) -> None:
        """Give the groups back; ranks that still expect a message get an error."""
        group, self._upward, self._downward = self._upward, None, None
        if group is not None and self.most is not None and self._size > 1:
            abort_nccl(group, self._time_limit)
