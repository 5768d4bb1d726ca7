"""The last word on a commit: kept in one place, so that no two ranks can take it for different things."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from torch._C._distributed_c10d import Store

from ..errors import UndecidedError

__all__ = ["Decisions", "Store"]

_T = TypeVar("_T")

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

    def decide(self, key: str, proposal: str) -> str:
        """What was decided for `key`: `proposal`, unless another rank was first.

        Raises:
            UndecidedError: the store does not answer, so this rank cannot know.
        """
        store = self._store
        if store is None:
            return proposal
        self._old.append(key)
        answer: bytes = self._within_limit(key, lambda: store.compare_set(key, "", proposal))
        return answer.decode()

    def forget(self, *, delete: bool) -> None:
        """Be done with what was decided so far. One rank deletes it, once all are known to have read it."""
        store, keys = self._store, self._old
        self._old = []
        if delete and store is not None and keys:
            self._within_limit("earlier decisions", lambda: [store.delete_key(key) for key in keys])

    def _within_limit(self, what: str, action: Callable[[], _T]) -> _T:
        """Run `action` in a thread of its own: the store's client has no time limit for it."""
        results: list[_T] = []
        errors: list[Exception] = []

        def run() -> None:
            try:
                results.append(action())
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=run, name="eplb-decision", daemon=True)
        thread.start()
        # In pieces: time in which the process stood still, stopped, is no time to answer.
        for _ in range(_PIECES):
            thread.join(self._limit / _PIECES)
        if results:
            return results[0]
        cause = errors[0] if errors else f"no answer within {self._limit:g} s"
        raise UndecidedError(f"the store cannot be asked for {what}: {cause}")
