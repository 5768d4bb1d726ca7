"""The last word on a commit: kept in one place, so that no two ranks can take it for different things."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from torch._C._distributed_c10d import Store

from ...core.errors import UndecidedError

__all__ = ["Decisions", "Store"]

_logger = logging.getLogger(__name__)
_PIECES = 20  # of a time limit


class Decisions:
    """Decisions that the first rank to speak takes for all, in a key-value store.

    A vote alone does not do: when a rank stops in the middle of it, some ranks have the result and others run
    out of time. What counts is what the store says, whoever wrote it first.

    Args:
        store: compare-and-set store that all ranks reach; None for a lone rank.
        time_limit: seconds to wait for its answer.
    """

    def __init__(self, store: Store | None, time_limit: float) -> None:
        self._store = store
        self._limit = time_limit
        self._old: list[str] = []
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._last: _Call | None = None
        if store is not None:
            # Made now, since there may be no more threads to be had when a decision is due.
            threading.Thread(target=_serve, args=(self._calls,), name="eplb-decisions", daemon=True).start()

    def decide(self, key: str, proposal: str) -> str:
        """What was decided for `key`: `proposal`, unless another rank was first.

        Raises:
            UndecidedError: the store does not answer, so this rank cannot know.
        """
        store = self._store
        if store is None:
            return proposal
        self._old.append(key)
        try:
            answer: bytes = self._ask(lambda: store.compare_set(key, "", proposal))
        except Exception as error:
            raise UndecidedError(f"the store cannot be asked for {key}: {error}") from error
        return answer.decode()

    def answers(self) -> bool:
        """Whether the store can be asked. To be known before anything depends on it."""
        store = self._store
        try:
            return store is None or bool(self._ask(lambda: [store.check(["any"])]))
        except Exception as error:
            _logger.warning("the store, which has the last word on every commit, does not answer: %s", error)
            return False

    def forget(self, *, delete: bool) -> None:
        """Be done with what was decided so far. One rank deletes it, once all are known to have read it;
        where the store does not answer, it stays there."""
        store, keys = self._store, self._old
        self._old = []
        if delete and store is not None and keys:
            with suppress(Exception):
                self._ask(lambda: [store.delete_key(key) for key in keys])

    def close(self) -> None:
        """Ask nothing any more."""
        self._calls.put(None)

    def _ask(self, action: Callable[[], Any]) -> Any:
        """What `action` gives or raises, in a thread of its own: the store's client has no time limit."""
        if self._last is not None and not self._last.done.is_set():
            raise TimeoutError("no answer to an earlier question either")
        call = self._last = _Call(action)
        self._calls.put(call)
        # In pieces: time in which the process stood still, stopped, is no time to answer.
        for _ in range(_PIECES):
            if call.done.wait(self._limit / _PIECES):
                break
        else:
            raise TimeoutError(f"no answer within {self._limit:g} s")
        if call.error is not None:
            raise call.error
        return call.result


class _Call:
    """A question to the store, and what came of it once it is done."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self.action = action
        self.done = threading.Event()
        self.result: Any = None
        self.error: Exception | None = None


def _serve(calls: SimpleQueue[_Call | None]) -> None:
    while (call := calls.get()) is not None:
        try:
            call.result = call.action()
        except Exception as error:
            call.error = error
        call.done.set()
