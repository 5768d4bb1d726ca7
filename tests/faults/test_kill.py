"""A rank is killed in any phase: the others keep one placement, notice in time, and never wait again."""

from __future__ import annotations

from contextlib import nullcontext
from unittest import mock

import pytest

from eplb_plugin.runtime.control.throttle import Throttle
from tests.faults.cluster import Seat, run_cluster
from tests.faults.phases import PHASES, at_phases, once
from tests.faults.serving import SIZE, Service, Survivor
from tests.faults.table import Record

LIMIT = 4.0
MARGIN = 10.0


def lose_a_rank(seat: Seat, mode: str, victim: int, phase: str) -> Survivor:
    service = Service(seat, mode=mode, time_limit=LIMIT)
    service.serve(2)
    if seat.rank == victim:
        with at_phases(once(phase, seat.die)):
            return service.outlive(2 * LIMIT + MARGIN)
    return service.outlive(2 * LIMIT + MARGIN)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_killed_rank_ends_the_balancing_and_nothing_else(
    mode: str, victim: int, phase: str, record: Record
) -> None:
    ended = run_cluster(lose_a_rank, SIZE, mode, victim, phase, dies={victim})
    survivors = [survivor for survivor in ended if survivor is not None]
    assert len(survivors) == SIZE - 1
    assert all(survivor.rows == survivors[0].rows for survivor in survivors)
    assert all(survivor.off == survivors[0].off for survivor in survivors)
    assert "RankLostError" in survivors[0].off
    assert not any(survivor.undecided for survivor in survivors)
    seconds = max(survivor.seconds for survivor in survivors)
    record(f"SIGKILL of rank {victim}", mode, phase, placement=True, outputs=None, seconds=seconds)


def lose_a_pausing_rank(seat: Seat, victim: int, pauses: int) -> Survivor:
    """The victim dies in one of its pauses: with some messages of a batch sent and others not, say."""
    service = Service(seat, mode="async", time_limit=LIMIT, background_share=0.2)
    service.serve(2)
    left = [pauses]

    def pause(self: Throttle) -> None:
        left[0] -= 1
        if not left[0]:
            seat.die()

    with mock.patch.object(Throttle, "pause", pause) if seat.rank == victim else nullcontext():
        return service.outlive(2 * LIMIT + MARGIN)


@pytest.mark.parametrize("pauses", [1, 7, 13])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_may_die_between_any_two_pieces_of_work(victim: int, pauses: int, record: Record) -> None:
    ended = run_cluster(lose_a_pausing_rank, SIZE, victim, pauses, dies={victim})
    survivors = [survivor for survivor in ended if survivor is not None]
    assert len(survivors) == SIZE - 1
    assert all(survivor.rows == survivors[0].rows for survivor in survivors)
    assert all(survivor.off == survivors[0].off for survivor in survivors)
    assert not any(survivor.undecided for survivor in survivors)
    seconds = max(survivor.seconds for survivor in survivors)
    record(f"SIGKILL of rank {victim}", "async", f"pause {pauses}", True, None, seconds)
