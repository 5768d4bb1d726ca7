"""Pauses of the background: as long as the work and the share ask for, within bounds, none in a hurry."""

from __future__ import annotations

import threading
from unittest import mock

import pytest

from eplb_plugin.runtime.control import throttle as throttles
from eplb_plugin.runtime.control.scheduling import AtOnce, BetweenSteps
from eplb_plugin.runtime.control.throttle import Throttle


class Clock:
    """Time that passes when the test says so, and in waits."""

    def __init__(self) -> None:
        self.busy = self.waited = 0.0

    def thread_time(self) -> float:
        return self.busy

    def perf_counter(self) -> float:
        return self.busy + self.waited


class NeverSet(threading.Event):
    """A wait takes all of its time on the clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self._clock.waited += timeout
        return False


def make(share: float, longest: float) -> tuple[Throttle, Clock]:
    clock = Clock()
    throttle = Throttle(share, longest)
    throttle._lifted = NeverSet(clock)
    return throttle, clock


def test_work_is_the_share_of_all_time() -> None:
    made, clock = make(0.1, 1e9)
    with mock.patch.object(throttles, "time", clock):
        made.pause()
        for piece in (0.004, 0.02, 0.001, 0.5):
            clock.busy += piece
            made.pause()
    assert clock.waited == pytest.approx(9 * clock.busy)


def test_a_share_of_one_never_pauses() -> None:
    made, clock = make(1.0, 1e9)
    with mock.patch.object(throttles, "time", clock):
        for _ in range(3):
            clock.busy += 1
            made.pause()
    assert clock.waited == 0
    AtOnce().throttle.pause()


def test_what_is_too_short_to_pause_after_counts_later() -> None:
    made, clock = make(0.5, 1e9)
    with mock.patch.object(throttles, "time", clock):
        made.pause()
        for _ in range(100):
            clock.busy += 0.001
            made.pause()
    assert clock.waited == pytest.approx(0.1, abs=throttles._SHORTEST)


def test_messages_cost_what_the_fastest_of_them_did() -> None:
    made, clock = make(0.5, 1e9)
    with mock.patch.object(throttles, "time", clock):
        made.pause()
        made.count_transfer(1000, 1.0)
        made.pause()
        assert clock.waited == pytest.approx(1.0)
        made.count_transfer(2000, 20.0)  # waited for a peer
        made.pause()
        assert clock.waited == pytest.approx(3.0)
        made.count_transfer(1000, 0.1)
        made.count_transfer(0, 50.0)
        made.pause()
        assert clock.waited == pytest.approx(3.1)


def test_pauses_between_two_collectives_are_bounded() -> None:
    made, clock = make(0.01, 2.0)
    with mock.patch.object(throttles, "time", clock):
        made.pause()
        for _ in range(5):
            clock.busy += 0.01
            made.pause()
        assert clock.waited == pytest.approx(2.0)
        made.ranks_met()
        clock.busy += 1.0
        made.pause()
    assert clock.waited == pytest.approx(4.0)


def test_nobody_pauses_once_it_is_to_be_finished() -> None:
    scheduler = BetweenSteps(0, share=1e-9, longest=3600.0)
    scheduler.throttle.pause()
    scheduler.throttle.count_transfer(1, 3600.0)
    pausing = threading.Thread(target=scheduler.throttle.pause, daemon=True)
    pausing.start()
    scheduler.finish(pausing)
    assert not pausing.is_alive()


def test_nobody_pauses_once_something_failed() -> None:
    scheduler = BetweenSteps(0, share=1e-9, longest=3600.0)
    scheduler.throttle.pause()
    scheduler.fail(ValueError("no"))
    scheduler.throttle.count_transfer(1, 3600.0)
    scheduler.throttle.pause()
    with pytest.raises(ValueError, match="no"):
        scheduler.step_ended(1)
