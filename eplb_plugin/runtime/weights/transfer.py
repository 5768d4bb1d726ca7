"""One migration batch on one rank: staged first, written layer by layer once it is committed."""

from __future__ import annotations

import time
from collections.abc import Iterator

from ..control.throttle import Throttle
from .staging import Arrival, Fills, Round, StagedBatch
from .streams import DeviceOrder
from .transport import InFlight, Message, Transport

__all__ = ["Transfer"]


class Transfer:
    """What a rank sends, receives and writes in one migration batch.

    The calls are, in this order: `fill_first`, `start`, `receive`, and `commit` for each layer.

    Attributes:
        failure: why something could not be filled. It was sent nonetheless, since peers wait for it.
        rounds: of each round that has ended, bytes of the busier direction, and seconds.
    """

    def __init__(self, staged: StagedBatch, transport: Transport) -> None:
        self._staged, self._transport = staged, transport
        self.failure: Exception | None = None
        self.rounds: list[tuple[int, float]] = []
        self._filled = 0  # calls of the first round whose messages are filled
        self._in_flight: list[InFlight] = []
        self._started = 0.0

    def fill_first(self) -> None:
        """Fill the messages that leave first; nothing is sent yet."""
        self._fill_all(self._calls(self._first_round())[0])
        self._filled = 1

    def start(self) -> None:
        """Start the messages of the first round, and wait for none of them.

        Raises:
            RankLostError: a peer does not answer.
        """
        self._send(self._first_round(), self._filled)

    def receive(self, streams: DeviceOrder, throttle: Throttle) -> Iterator[list[Arrival]]:
        """Copy what stays on the rank, and wait until all is sent and received, round by round.

        The caller has to go through all of it, also after an error: peers wait for messages of this rank.

        Yields:
            Arrivals that are complete, each once, while others may be on their way.

        Raises:
            RankLostError: a peer does not answer. The staging memory is lost then: a late message may still
                write to it.
        """
        for fills in self._staged.fills:
            self._fill(fills)
            throttle.pause()
        if self._staged.local:
            streams.settle()
            yield self._staged.local
        for number, now in enumerate(self._staged.rounds):
            if number:
                self._send(now)
            elsewhere = 0.0
            for num_messages, arrivals in now.verification_groups():
                self._in_flight[0].wait(num_messages)  # the first call has all receives of the round
                streams.settle()
                left = time.perf_counter()
                yield arrivals
                elsewhere += time.perf_counter() - left
            for messages in self._in_flight:
                messages.wait()
            streams.settle()
            self.rounds.append((now.num_bytes, time.perf_counter() - self._started - elsewhere))
            throttle.count_transfer(*self.rounds[-1])
            throttle.pause()

    def commit(self, layer: int) -> None:
        """Write what was staged for a layer to its slots."""
        for target, staged in self._staged.writes[layer]:
            target.copy_(staged)

    def _first_round(self) -> Round:
        return next(iter(self._staged.rounds), Round())

    def _calls(self, now: Round) -> list[list[tuple[Message, Fills]]]:
        """The sends of a round, by call of the transport: one each, unless it needs all in one call."""
        at_once = self._transport.max_messages is not None or not now.sends
        return [now.sends] if at_once else [[send] for send in now.sends]

    def _send(self, now: Round, filled: int = 0) -> None:
        """Start a round. What is filled is on its way while the next message is filled."""
        self._in_flight = []
        for number, call in enumerate(self._calls(now)):
            if number >= filled:
                self._fill_all(call)
            if not number:
                self._started = time.perf_counter()
            receives = [] if number else now.receives
            self._in_flight.append(self._transport.start([message for message, _ in call], receives))

    def _fill_all(self, call: list[tuple[Message, Fills]]) -> None:
        for _, fills in call:
            if fills:
                self._fill(fills)

    def _fill(self, fills: Fills) -> None:
        try:
            _copy(fills)
        except Exception as caught:  # every kind, since the other ranks wait
            self.failure = self.failure or caught


def _copy(fills: Fills) -> None:
    for target, source in fills:
        target.copy_(source)
