"""What the store says holds, and a store that does not say anything is not waited for."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch.distributed as dist

from eplb_plugin.errors import UndecidedError
from eplb_plugin.runtime.decisions import Decisions

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
    decisions = Decisions(_SlowStore(naps=15), LIMIT)  # type: ignore[arg-type]
    sender.send("asks")
    try:
        sender.send(decisions.decide("commit", "7"))
    except UndecidedError as error:
        sender.send(str(error))


def test_the_first_to_speak_decides_for_all(tmp_path: Path) -> None:
    ranks = [Decisions(dist.FileStore(str(tmp_path / "store"), 2), LIMIT) for _ in range(2)]
    assert ranks[1].decide("hop", "12") == "12"
    assert ranks[0].decide("hop", "keep") == "12"
    assert ranks[0].decide("next hop", "keep") == "keep"


def test_a_lone_rank_decides_itself() -> None:
    assert Decisions(None, LIMIT).decide("hop", "3") == "3"


def test_a_silent_store_leaves_it_undecided() -> None:
    store = _SilentStore()
    with pytest.raises(UndecidedError, match=r"asked for hop: no answer within 0\.1 s"):
        Decisions(store, 0.1).decide("hop", "3")  # type: ignore[arg-type]
    store.over.set()


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
