"""Rests of the background: as long as the work and the share ask for, within bounds, and over in a hurry."""

from __future__ import annotations

import threading
from unittest import mock

import pytest

from eplb_plugin.runtime.control import throttle as rests
from eplb_plugin.runtime.control.scheduling import AtOnce, BetweenSteps
from eplb_plugin.runtime.control.throttle import Rests


class Clock:
    """Time that passes when the test says so, and in waits."""

    def __init__(self) -> None:
        self.busy = self.waited = 0.0

    def thread_time(self) -> float:
        return self.busy

    def perf_counter(self) -> float:
        return self.busy + self.waited


class Changed(threading.Condition):
    """Nothing ever changes; a wait takes all of its time on the clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def wait_for(self, predicate: object, timeout: float | None = None) -> bool:
        assert timeout is not None
        self._clock.waited += timeout
        return False


def make(share: float, at_most: float) -> tuple[Rests, Clock]:
    clock = Clock()
    return Rests(share, at_most, lambda: False, Changed(clock)), clock


def test_work_is_the_share_of_all_time() -> None:
    made, clock = make(0.1, 1e9)
    with mock.patch.object(rests, "time", clock):
        made.rest()
        for piece in (0.004, 0.02, 0.001, 0.5):
            clock.busy += piece
            made.rest()
    assert clock.waited == pytest.approx(9 * clock.busy)


def test_a_share_of_one_never_rests() -> None:
    made, clock = make(1.0, 1e9)
    with mock.patch.object(rests, "time", clock):
        for _ in range(3):
            clock.busy += 1
            made.rest()
    assert clock.waited == 0
    AtOnce().rest()


def test_what_is_too_short_to_rest_after_counts_later() -> None:
    made, clock = make(0.5, 1e9)
    with mock.patch.object(rests, "time", clock):
        made.rest()
        for _ in range(100):
            clock.busy += 0.001
            made.rest()
    assert clock.waited == pytest.approx(0.1, abs=rests._SHORTEST)


def test_messages_cost_what_the_fastest_of_them_did() -> None:
    made, clock = make(0.5, 1e9)
    with mock.patch.object(rests, "time", clock):
        made.rest()
        made.moved(1000, 1.0)
        made.rest()
        assert clock.waited == pytest.approx(1.0)
        made.moved(2000, 20.0)  # waited for a peer
        made.rest()
        assert clock.waited == pytest.approx(3.0)
        made.moved(1000, 0.1)
        made.moved(0, 50.0)
        made.rest()
        assert clock.waited == pytest.approx(3.1)


def test_rests_between_two_meetings_are_bounded() -> None:
    made, clock = make(0.01, 2.0)
    with mock.patch.object(rests, "time", clock):
        made.rest()
        for _ in range(5):
            clock.busy += 0.01
            made.rest()
        assert clock.waited == pytest.approx(2.0)
        made.met()
        clock.busy += 1.0
        made.rest()
    assert clock.waited == pytest.approx(4.0)


def test_nobody_rests_once_it_is_to_be_finished() -> None:
    pace = BetweenSteps(0, share=1e-9, longest_rest=3600.0)
    pace.rest()
    pace.moved(1, 3600.0)
    resting = threading.Thread(target=pace.rest, daemon=True)
    resting.start()
    pace.finish(lambda: not resting.is_alive())
    assert not resting.is_alive()
