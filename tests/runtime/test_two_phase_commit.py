"""What a rank does for all that it can know, and a store that answers late, or never."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from eplb_plugin.core.errors import RankLostError, TransferError, UndecidedError
from eplb_plugin.runtime.control.rank_group import RankGroup
from eplb_plugin.runtime.control.scheduling import AtOnce
from eplb_plugin.runtime.control.two_phase_commit import DecisionStore, TwoPhaseCommit

LIMIT = 1.0


class _SlowStore:
    """Answers after so many naps, which a stopped process does not take."""

    def __init__(self, naps: int) -> None:
        self._naps = naps

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        for _ in range(self._naps):
            time.sleep(0.02)
        return value.encode()


class _SilentStore:
    def __init__(self) -> None:
        self.over = threading.Event()

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        self.over.wait()
        return b""


def _ask(sender: Connection) -> None:
    decisions = DecisionStore(_SlowStore(naps=15), LIMIT)  # type: ignore[arg-type]
    sender.send("asks")
    try:
        sender.send(decisions.decide("commit", "7"))
    except UndecidedError as error:
        sender.send(str(error))


def test_the_first_to_speak_decides_for_all(tmp_path: Path) -> None:
    ranks = [DecisionStore(dist.FileStore(str(tmp_path / "store"), 2), LIMIT) for _ in range(2)]
    assert ranks[1].decide("batch", "12") == "12"
    assert ranks[0].decide("batch", "keep") == "12"
    assert ranks[0].decide("next batch", "keep") == "keep"


def test_a_lone_rank_decides_itself() -> None:
    assert DecisionStore(None, LIMIT).decide("batch", "3") == "3"


def test_a_silent_store_leaves_it_undecided() -> None:
    store = _SilentStore()
    with pytest.raises(UndecidedError, match=r"asked for batch: no answer within 0\.1 s"):
        DecisionStore(store, 0.1).decide("batch", "3")  # type: ignore[arg-type]
    store.over.set()


def test_a_store_is_asked_no_more_while_it_owes_an_answer() -> None:
    store = _SilentStore()
    decisions = DecisionStore(store, 0.1)  # type: ignore[arg-type]
    with pytest.raises(UndecidedError, match="no answer within"):
        decisions.decide("batch", "3")
    with pytest.raises(UndecidedError, match="no answer to an earlier question either"):
        decisions.decide("next batch", "3")
    assert not decisions.answers()
    decisions.forget(delete=True)
    store.over.set()


def test_a_store_that_fails_is_found_before_it_is_needed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    decisions = DecisionStore(store, LIMIT)
    assert decisions.answers()
    assert DecisionStore(None, LIMIT).answers()
    assert decisions.decide("batch", "3") == "3"
    with mock.patch.object(dist.FileStore, "check", side_effect=OSError("gone")):
        assert not decisions.answers()
    assert "does not answer: gone" in caplog.text
    with mock.patch.object(dist.FileStore, "delete_key", side_effect=OSError("gone")):
        decisions.forget(delete=True)  # what cannot be deleted is in nobody's way
    with (
        mock.patch.object(dist.FileStore, "compare_set", side_effect=OSError("gone")),
        pytest.raises(UndecidedError, match="asked for batch: gone"),
    ):
        decisions.decide("batch", "3")


def test_no_thread_has_to_be_made_for_a_decision(tmp_path: Path) -> None:
    before = threading.active_count()
    decisions = DecisionStore(dist.FileStore(str(tmp_path / "store"), 1), LIMIT)
    with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
        assert decisions.decide("batch", "3") == "3"
    decisions.close()
    for _ in range(100):
        if threading.active_count() == before:
            break
        time.sleep(0.05)
    assert threading.active_count() == before


@pytest.mark.timeout(60)
def test_time_in_which_a_process_stands_still_does_not_count() -> None:
    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_ask, args=(sender,), daemon=True)
    process.start()
    assert process.pid is not None
    assert receiver.recv() == "asks"
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2 * LIMIT)
    os.kill(process.pid, signal.SIGCONT)
    assert receiver.recv() == "7"
    process.join()


CORRUPTED, NO_STORE = -1, -2


class _Votes(RankGroup):
    """The votes that this rank sees, or the error in their place."""

    def __init__(self, seen: list[int] | Exception) -> None:
        super().__init__(device="cpu", alone=True)
        self._seen = seen
        self.own: list[int] = []

    def vote(self, phase: str, error: object = None, value: int = 0, *_: object, **__: object) -> list[int]:
        self.own.append(value)
        if isinstance(self._seen, Exception):
            raise self._seen
        return self._seen


class _Steps(AtOnce):
    """Proposes step 12, and keeps what is released."""

    def __init__(self) -> None:
        super().__init__()
        self.released: list[int | None] = []

    def propose_step(self) -> int:
        return 12

    def release(self, step: int | None, switches: Sequence[Callable[[], None]] = ()) -> float:
        self.released.append(step)
        return super().release(step, switches)


LOST = RankLostError("no answer")
FAILED = TransferError("failed on 1 of 3 ranks")
# What the rank sees and what the store holds already; whether its own arrivals are corrupted, and the store
# answers; then: the error, whether it switched, the key in the store.
TABLE: dict[str, tuple[list[int] | Exception, str, bool, bool, type[Exception] | None, bool, str]] = {
    "all are ready": ([12, 14, 12], "", False, True, None, True, "14"),
    "all are ready, another rank was first": ([12, 14, 12], "14", False, True, None, True, "14"),
    "all are ready, another rank has not all votes": (
        [12, 14, 12],
        "keep",
        False,
        True,
        RankLostError,
        False,
        "keep",
    ),
    "one failed": (FAILED, "", False, True, TransferError, False, ""),
    "one has corrupted arrivals": ([12, CORRUPTED, 12], "", False, True, None, False, ""),
    "this one has corrupted arrivals": ([CORRUPTED, 14, 12], "", True, True, None, False, ""),
    "one has no store": ([12, NO_STORE, CORRUPTED], "", False, True, RankLostError, False, ""),
    "votes are lost": (LOST, "", False, True, RankLostError, False, "keep"),
    "votes are lost on this rank alone": (LOST, "14", False, True, RankLostError, True, "14"),
    "votes are lost, this one was against": (LOST, "", True, True, RankLostError, False, ""),
    "votes are lost, this one has no store": (LOST, "", False, False, RankLostError, False, ""),
    "votes fail in another way": (MemoryError("none"), "", False, True, MemoryError, False, "keep"),
}


@pytest.mark.parametrize("case", TABLE)
def test_what_a_rank_does_for_what_it_knows(case: str, tmp_path: Path) -> None:
    seen, written, corrupted, answers, raises, switched, left = TABLE[case]
    store = dist.FileStore(str(tmp_path / "store"), 1)
    if written:
        store.set("batch", written)
    group, scheduler, done = _Votes(seen), _Steps(), []
    commits = TwoPhaseCommit(group, store, LIMIT)
    with (
        mock.patch.object(DecisionStore, "answers", return_value=answers),
        pytest.raises(raises) if raises else nullcontext(),
    ):
        seconds = commits.commit("batch", [lambda: done.append(1)], scheduler, num_corrupted=int(corrupted))
        assert (seconds is not None) == switched
    commits.decisions.close()
    assert bool(done) == switched
    assert group.own == [CORRUPTED if corrupted else 12 if answers else NO_STORE]
    assert (store.get("batch").decode() if store.check(["batch"]) else "") == left
    # Only where the rank itself gives up may a fence be left to whoever catches the error.
    assert scheduler.released == ([14] if switched else [] if left == "keep" else [None])


def test_a_rank_that_cannot_know_is_undecided() -> None:
    store = _SilentStore()
    commits = TwoPhaseCommit(_Votes([12, 12]), store, 0.1)  # type: ignore[arg-type]
    with (
        mock.patch.object(DecisionStore, "answers", return_value=True),
        pytest.raises(UndecidedError, match="no answer within"),
    ):
        commits.commit("batch", [], _Steps())
    # Nobody else can be told why either.
    assert commits.give_up("the store is gone") == "the store is gone"
    store.over.set()


def test_a_rank_that_fails_to_switch_is_undecided() -> None:
    def switch() -> None:
        raise OSError("no memory to write to")

    commits = TwoPhaseCommit(RankGroup(device="cpu", alone=True), None, LIMIT)
    with pytest.raises(UndecidedError, match="did not switch as was decided: no memory"):
        commits.commit("batch", [switch], _Steps())


def test_ranks_that_pause_vote_on_being_ready_before_any_sets_a_fence() -> None:
    scheduler = _Steps()
    scheduler.round_bytes = 1000  # type: ignore[assignment]
    group = _Votes([0, 3])
    commits = TwoPhaseCommit(group, None, LIMIT)
    assert commits.commit("batch", [], scheduler) is None
    assert group.own == [0]
    assert scheduler.released == []


def test_the_first_reason_to_give_up_is_that_of_all(tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 2)
    ranks = [TwoPhaseCommit(RankGroup(device="cpu", alone=True), store, LIMIT) for _ in range(2)]
    assert [rank.give_up(f"reason {number}") for number, rank in enumerate(ranks)] == ["reason 0"] * 2
