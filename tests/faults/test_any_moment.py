"""A rank is killed or stands still at moments that no phase names, while rebalances follow one another."""

from __future__ import annotations

import random
import threading
import time

import pytest

from tests.faults.cluster import Seat, run_cluster
from tests.faults.serving import SIZE, Service, Survivor
from tests.faults.table import Record
from tests.faults.test_stop import all_of

LIMIT = 1.5
MARGIN = 10.0
REBALANCE = 0.3  # seconds, more than one takes on an idle machine
KILLS = STOPS = 8


def die_at_some_moment(seat: Seat, mode: str, seed: int) -> Survivor:
    service = Service(seat, mode=mode, time_limit=2 * LIMIT, interval=1)
    service.serve(3) if mode == "sync" else [service.step() for _ in range(20)]
    chance = random.Random(seed)
    victim, delay = chance.randrange(SIZE), chance.random() * REBALANCE
    if seat.rank == victim:
        threading.Timer(delay, seat.die).start()
    return service.outlive(4 * LIMIT + MARGIN)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_killed_at_any_moment(mode: str, record: Record) -> None:
    seconds = 0.0
    for seed in range(KILLS):
        victim = random.Random(seed).randrange(SIZE)
        ended = run_cluster(die_at_some_moment, SIZE, mode, seed, dies={victim})
        survivors = [survivor for survivor in ended if survivor is not None]
        assert not any(survivor.undecided for survivor in survivors)
        assert all(survivor.rows == survivors[0].rows for survivor in survivors)
        assert all(survivor.off == survivors[0].off for survivor in survivors)
        seconds = max(seconds, *(survivor.seconds for survivor in survivors))
    record(f"SIGKILL of some rank, {KILLS} random moments", mode, "anywhere", True, None, seconds)


def stop_at_some_moments(seat: Seat, mode: str) -> list[tuple[float, bool, float]]:
    """Of each stop: its seconds, whether balancing ended, and seconds until the ranks agreed about that."""
    chance = random.Random(mode)
    found = []
    for _ in range(STOPS):
        if seat.rank == 0:
            seat.forget("fault")
        service = Service(seat, mode=mode, time_limit=LIMIT, interval=1)
        for _ in range(20):
            service.step()
        # Around the limit, some ranks run out of time and others do not.
        stopped = LIMIT * chance.uniform(0.6, 1.6)
        victim, delay = chance.randrange(SIZE), chance.random() * REBALANCE
        if seat.rank == victim:
            threading.Timer(delay, seat.stop, (stopped,)).start()
        worked = 0
        while True:
            report = service.step()
            fault = seat.marked("fault")
            waited = 0.0 if fault is None else time.monotonic() - fault
            assert waited < stopped + 4 * LIMIT + MARGIN, service.balancer.off or "on"
            worked += waited > stopped and report is not None and not report.failed
            off = bool(service.balancer.off)
            if all_of(seat, off) or all_of(seat, worked >= 3 and not off):
                break
        assert len(seat.logged) == off, seat.logged
        seat.logged.clear()
        service.balancer.close()
        found.append((stopped, off, waited))
    return found


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_stopped_at_any_moment_for_about_the_limit(mode: str, record: Record) -> None:
    ranks = run_cluster(stop_at_some_moments, SIZE, mode, limit=60 + STOPS * (4 * LIMIT + MARGIN))
    ended = [off for _, off, _ in ranks[0]]
    assert all([off for _, off, _ in rank] == ended for rank in ranks)
    record(
        f"SIGSTOP of some rank for about the limit, {STOPS} random moments",
        mode,
        "anywhere",
        placement=True,
        outputs=True,
        seconds=max(waited for rank in ranks for *_, waited in rank),
        after=f"off in {sum(ended)}",
    )
