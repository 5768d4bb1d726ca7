"""A rank stands still in any phase: briefly, and all goes on; longer than the limit, and balancing ends."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from tests.faults.cluster import Seat, run_cluster
from tests.faults.phases import PHASES, Hook, at_phases, once
from tests.faults.serving import AT_ONCE, INTERVAL, SIZE, Service
from tests.faults.table import Record

LIMIT = 3.0
STOPPED = 1.5 * LIMIT  # the others give up meanwhile, and are still doing so when it comes back
PAUSE = 0.5
AMPLE = 20.0  # a limit that nothing here may reach
MARGIN = 10.0


def all_of(seat: Seat, flag: bool) -> bool:
    """Whether all ranks say so."""
    said = torch.tensor([int(flag)])
    dist.all_reduce(said)
    return int(said) == seat.size


@dataclass(frozen=True)
class Stopped:
    """What a rank made of one stop: seconds until it turned off, or else until balancing worked again."""

    off: bool
    seconds: float


def stop_for_long(seat: Seat, mode: str, victim: int) -> dict[str, Stopped]:
    """By phase. The model serves on all the time."""
    found = {}
    for phase in PHASES:
        if seat.rank == 0:
            seat.forget("fault")
        seat.logged.clear()
        service = Service(seat, mode=mode, time_limit=LIMIT)
        balancer = service.balancer
        service.serve(1)
        hook: Hook = once(phase, lambda: seat.stop(STOPPED)) if seat.rank == victim else lambda phase: None
        told, worked = 0.0, 0
        with at_phases(hook):
            while True:
                fault = seat.marked("fault")
                waited = 0.0 if fault is None else time.monotonic() - fault
                assert waited < STOPPED + 2 * LIMIT + MARGIN, (
                    f"{phase}: {balancer.off or 'on'}, {waited:.1f} s"
                )
                report = service.step()
                told = told or service.off_at or 0.0
                # Where the others had nothing to wait for, they did not even notice. The first report may be
                # of the rebalance that was stopped.
                worked += fault is not None and report is not None and not report.failed
                if all_of(seat, worked >= 2):
                    told = time.monotonic()
                    break
                if all_of(seat, bool(balancer.off)):
                    break
        assert all_of(seat, bool(balancer.off)) or all_of(seat, not balancer.off)
        if balancer.off:
            start = time.monotonic()
            for _ in range(2 * INTERVAL):
                assert service.step() is None
            assert time.monotonic() - start < AT_ONCE * INTERVAL
            assert "RankLostError" in balancer.off
        assert len(seat.logged) == bool(balancer.off), seat.logged
        fault = seat.marked("fault")
        assert fault is not None
        found[phase] = Stopped(bool(balancer.off), told - fault)
        balancer.close()
        dist.barrier()
    return found


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_rank_that_comes_back_too_late_serves_on(mode: str, victim: int, record: Record) -> None:
    ranks = run_cluster(stop_for_long, SIZE, mode, victim, limit=60.0 + len(PHASES) * (STOPPED + MARGIN))
    for phase in PHASES:
        off = ranks[0][phase].off
        # In the background, and once all is decided, nobody waits for anybody's word.
        assert off or (mode, phase) == ("async", "decided")
        record(
            f"SIGSTOP of rank {victim}, {STOPPED:g} s",
            mode,
            phase,
            placement=True,
            outputs=True,
            seconds=max(found[phase].seconds for found in ranks),
            after="off" if off else "on",
        )


def fall_behind(seat: Seat, mode: str, victim: int, stops: bool) -> dict[str, float]:
    """Seconds from the delay to the report, by phase: each is one that moved experts."""
    service = Service(seat, mode=mode, time_limit=AMPLE)
    seconds = {}
    service.serve(1)
    for phase in PHASES:

        def delay() -> None:
            if stops:
                seat.stop(PAUSE)
            else:
                seat.mark("fault")
                time.sleep(PAUSE)

        if seat.rank == 0:
            seat.forget("fault")
        dist.barrier()
        with at_phases(once(phase, delay) if seat.rank == victim else lambda phase: None):
            moves = 0
            # Phases after "verify" are entered only where something moves.
            while not all_of(seat, moves > 0 and seat.marked("fault") is not None):
                reports = service.serve(1)
                assert not any(report.failed for report in reports), reports
                moves = max(moves, *(report.moves for report in reports))
        fault = seat.marked("fault")
        assert fault is not None
        seconds[phase] = time.monotonic() - fault
        dist.barrier()
    assert not service.balancer.off
    assert not seat.logged
    return seconds


@pytest.mark.parametrize("stops", [True, False], ids=["stopped", "slow"])
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_rank_that_falls_behind_is_waited_for(mode: str, victim: int, stops: bool, record: Record) -> None:
    ranks = run_cluster(fall_behind, SIZE, mode, victim, stops)
    what = "SIGSTOP of" if stops else "slow"
    for phase in PHASES:
        record(
            f"{what} rank {victim}, {PAUSE:g} s",
            mode,
            phase,
            placement=True,
            outputs=True,
            seconds=max(seconds[phase] for seconds in ranks),
            after="on",
        )
