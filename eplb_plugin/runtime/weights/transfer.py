"""One migration batch on one rank: staged first, then committed layer by layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from .staging import Arrival, Fills, Round, StagedBatch
from .transport import InFlight, Transport

__all__ = ["Transfer"]


class Transfer:
    """What a rank sends, receives and writes in one migration batch.

    Args:
        staged: the place of every expert of the batch.

    Attributes:
        failure: why something could not be filled. It was sent nonetheless, since peers wait for it.
    """

    def __init__(self, staged: StagedBatch) -> None:
        self._staged = staged
        self.failure: Exception | None = None
        # The first has all that is received.
        self._in_flight = [InFlight()]
        self._started = 0.0

    def start(self, transport: Transport, agreed: Callable[[], object] = lambda: None) -> None:
        """Have the first messages on their way, without waiting for any.

        Args:
            transport: what they travel over.
            agreed: called before anything is sent; raises where that must not happen.

        Raises:
            RankLostError: a peer does not answer. What `agreed` raises.
        """
        self._send(transport, next(iter(self._staged.rounds), Round()), agreed)

    def finish(
        self,
        transport: Transport,
        check: Callable[[Sequence[Arrival]], None] = lambda arrivals: None,
        settle: Callable[[], None] = lambda: None,
        after: Callable[[int, float], None] = lambda *_: None,
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy what stays on the rank, and wait until all has been sent and received, round by round.

        Args:
            transport: as for `start`.
            check: called with arrivals that are complete, each once, while others may be on their way.
            settle: waits for the device.
            after: called after each round, with the bytes of its busier direction and the seconds it took.
            rest: called between pieces of work.

        Raises:
            RankLostError: a peer does not answer; the buffer is lost then, since what is late may still be
                written to it.
        """
        for fills in self._staged.fills:
            self._fill(fills)
            rest()
        if self._staged.local:
            settle()
            check(self._staged.local)
        for number, now in enumerate(self._staged.rounds):
            if number:
                self._send(transport, now)
            checking = 0.0
            for count, arrivals in now.verification_groups():
                self._in_flight[0].wait(count)
                settle()
                begun = time.perf_counter()
                check(arrivals)
                checking += time.perf_counter() - begun
            for messages in self._in_flight:
                messages.wait()
            settle()
            after(now.num_bytes, time.perf_counter() - self._started - checking)

    def commit(self, layer: int) -> None:
        """Write what was staged for a layer to its slots."""
        for target, staged in self._staged.writes[layer]:
            target.copy_(staged)

    def _send(self, transport: Transport, now: Round, agreed: Callable[[], object] = lambda: None) -> None:
        """Start a round: what is filled is on its way while the next is filled."""
        turns = (
            [now.sends]
            if transport.max_messages is not None or not now.sends
            else [[send] for send in now.sends]
        )
        self._in_flight = []
        for turn in turns:
            for _, fills in turn:
                if fills:
                    self._fill(fills)
            first = not self._in_flight
            if first:
                agreed()
                self._started = time.perf_counter()
            sends = [message for message, _ in turn]
            self._in_flight.append(transport.start(sends, now.receives if first else []))

    def _fill(self, fills: Fills) -> None:
        try:
            _copy(fills)
        except Exception as caught:  # every kind, since the other ranks wait
            self.failure = self.failure or caught


def _copy(fills: Fills) -> None:
    for target, source in fills:
        target.copy_(source)
