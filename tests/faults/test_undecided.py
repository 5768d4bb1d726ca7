"""A rank that cannot know whether the others switched over says so and stops; it never guesses or hangs."""

from __future__ import annotations

from contextlib import nullcontext
from unittest import mock

import pytest

from eplb_plugin.runtime.weights.transfer import Transfer
from tests.faults.cluster import Seat, run_cluster
from tests.faults.phases import at_phases, once
from tests.faults.serving import SIZE, Service, Survivor
from tests.faults.table import Record

LIMIT = 2.0
STOPPED = 3 * LIMIT  # a vote and a question to the store run out of time meanwhile
MARGIN = 10.0


def lose_the_store(seat: Seat, mode: str, phase: str, stops: bool) -> Survivor:
    """Rank 0 hosts the store, and goes down with it."""
    service = Service(seat, mode=mode, time_limit=LIMIT)
    service.serve(2)
    within = 2 * LIMIT + MARGIN + (STOPPED if stops else 0)
    fault = (lambda: seat.stop(STOPPED)) if stops else seat.die
    with at_phases(once(phase, fault)) if seat.rank == 0 else nullcontext():
        return service.outlive(within)


@pytest.mark.parametrize("phase", ["stage", "commit", "decided", "report"])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_store_that_dies_with_its_rank(mode: str, phase: str, record: Record) -> None:
    _, *ranks = run_cluster(lose_the_store, SIZE, mode, phase, False, dies={0}, store="tcp")
    decided = [rank for rank in ranks if not rank.undecided]
    assert all(rank.rows == decided[0].rows for rank in decided)
    if phase == "commit":
        # Without the vote of rank 0 only the store could tell; whoever missed it before voting is sure.
        assert not any(rank.changed for rank in decided)
    elif phase == "stage":
        # Nothing had been decided; later on, rank 0 may be ahead of ranks that have yet to ask.
        assert decided == ranks
    then = {0: "UndecidedError", len(ranks): "off"}.get(len(decided), "off or UndecidedError")
    seconds = max(rank.seconds for rank in ranks)
    record("SIGKILL of rank 0 and its TCPStore", mode, phase, True, None, seconds, then)


def test_a_store_that_stands_still(record: Record) -> None:
    first, *others = run_cluster(lose_the_store, SIZE, "sync", "commit", True, store="tcp")
    assert not first.undecided
    assert not first.changed
    assert all(rank.undecided or not rank.changed for rank in others)
    seconds = max(rank.seconds for rank in others)
    fault = f"SIGSTOP of rank 0 and its TCPStore, {STOPPED:g} s"
    record(fault, "sync", "commit", True, None, seconds, "off or UndecidedError")


def fail_to_switch(seat: Seat, mode: str, victim: int) -> Survivor:
    service = Service(seat, mode=mode, time_limit=LIMIT)
    service.serve(2)

    def commit(self: Transfer, layer: int) -> None:
        seat.mark("fault")
        raise OSError("no memory to write to")

    with mock.patch.object(Transfer, "commit", commit) if seat.rank == victim else nullcontext():
        return service.outlive(2 * LIMIT + MARGIN)


def run_out_of_memory(seat: Seat, mode: str, phase: str) -> Survivor:
    service = Service(seat, mode=mode, time_limit=LIMIT)
    service.serve(2)

    def fail() -> None:
        seat.mark("fault")
        raise MemoryError("none left")

    with at_phases(once(phase, fail)) if seat.rank == 1 else nullcontext():
        return service.outlive(2 * LIMIT + MARGIN)


@pytest.mark.parametrize("phase", ["commit", "decided"])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_an_error_of_another_kind(mode: str, phase: str, record: Record) -> None:
    """Before its vote nothing can have been decided; afterwards others may have switched over."""
    ranks = run_cluster(run_out_of_memory, SIZE, mode, phase)
    broken, others = ranks[1], [ranks[0], ranks[2]]
    assert all(rank.rows == others[0].rows and not rank.undecided for rank in others)
    assert broken.undecided == (phase == "decided")
    if phase == "decided":
        assert "did not switch as was decided: none left" in broken.off
    else:
        assert broken.rows == others[0].rows
    seconds = max(rank.seconds for rank in ranks)
    then = "UndecidedError there, off elsewhere" if phase == "decided" else "off"
    record("MemoryError on rank 1", mode, phase, True, None, seconds, then)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_rank_that_cannot_switch_over(mode: str, victim: int, record: Record) -> None:
    ranks = run_cluster(fail_to_switch, SIZE, mode, victim)
    broken, others = ranks[victim], [rank for rank in ranks if rank is not ranks[victim]]
    assert broken.undecided
    assert "did not switch on this rank: no memory to write to" in broken.off
    # All others did, and notice that it is gone.
    assert all(rank.changed and not rank.undecided for rank in others)
    assert all(rank.rows == others[0].rows for rank in others)
    record(
        f"switching over raises on rank {victim}",
        mode,
        "found in commit",
        placement=True,
        outputs=None,
        seconds=max(rank.seconds for rank in ranks),
        after="UndecidedError there, off elsewhere",
    )
