"""What the store says holds, and a store that does not say anything is not waited for."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from eplb_plugin.core.errors import UndecidedError
from eplb_plugin.runtime.control.two_phase_commit import DecisionStore

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
    assert ranks[1].decide("hop", "12") == "12"
    assert ranks[0].decide("hop", "keep") == "12"
    assert ranks[0].decide("next hop", "keep") == "keep"


def test_a_lone_rank_decides_itself() -> None:
    assert DecisionStore(None, LIMIT).decide("hop", "3") == "3"


def test_a_silent_store_leaves_it_undecided() -> None:
    store = _SilentStore()
    with pytest.raises(UndecidedError, match=r"asked for hop: no answer within 0\.1 s"):
        DecisionStore(store, 0.1).decide("hop", "3")  # type: ignore[arg-type]
    store.over.set()


def test_a_store_is_asked_no_more_while_it_owes_an_answer() -> None:
    store = _SilentStore()
    decisions = DecisionStore(store, 0.1)  # type: ignore[arg-type]
    with pytest.raises(UndecidedError, match="no answer within"):
        decisions.decide("hop", "3")
    with pytest.raises(UndecidedError, match="no answer to an earlier question either"):
        decisions.decide("next hop", "3")
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
    assert decisions.decide("hop", "3") == "3"
    with mock.patch.object(dist.FileStore, "check", side_effect=OSError("gone")):
        assert not decisions.answers()
    assert "does not answer: gone" in caplog.text
    with mock.patch.object(dist.FileStore, "delete_key", side_effect=OSError("gone")):
        decisions.forget(delete=True)  # what cannot be deleted is in nobody's way
    with (
        mock.patch.object(dist.FileStore, "compare_set", side_effect=OSError("gone")),
        pytest.raises(UndecidedError, match="asked for hop: gone"),
    ):
        decisions.decide("hop", "3")


def test_no_thread_has_to_be_made_for_a_decision(tmp_path: Path) -> None:
    before = threading.active_count()
    decisions = DecisionStore(dist.FileStore(str(tmp_path / "store"), 1), LIMIT)
    with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
        assert decisions.decide("hop", "3") == "3"
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
