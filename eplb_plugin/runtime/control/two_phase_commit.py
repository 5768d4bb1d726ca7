"""Two-phase commit: all ranks switch to a migration batch at the same step, or none does.

1. **Vote.** Each rank proposes a step that it has not reached. Its serving thread waits there (the fence).
2. **Decide.** The latest proposal goes to a key-value store by compare-and-set. The first writer decides.
3. **Switch.** The serving thread of each rank switches at the decided step.

Votes alone are not enough. When a rank stops during the vote, some ranks have all votes and others time out.
The store then tells both the same.

| what a rank knows | what it does | result on this rank |
|---|---|---|
| it failed before its vote | votes "failed" | keep: TransferError |
| its arrivals are corrupted | votes "corrupted" | keep: fetched again |
| its store does not answer | votes "no store" | keep, off: RankLostError |
| all votes, one of them "failed" | nothing more | keep: TransferError |
| all votes, one of them "no store" | nothing more | keep, off: RankLostError |
| all votes, one of them "corrupted" | nothing more | keep: fetched again |
| all votes, all of them steps | asks the store, proposing the latest step | as the store says |
| not all votes; its own was no step | nothing more: nobody switches without it | keep, off: RankLostError |
| not all votes; its own was a step | asks the store, proposing "keep" | as the store says, then off |
| the store says "keep" | nothing more | keep, off: RankLostError |
| the store says a step | switches at that step | new placement |
| the store does not answer | its serving thread stops too | undecided: UndecidedError |
| its own switch raises | its serving thread stops too | undecided: UndecidedError |

Keep: the old placement stays in force, and the next interval tries again. Off: balancing ends on all ranks
that can be reached. Undecided: the rank must not serve on, since other ranks may use other weights.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeAlias

from torch._C._distributed_c10d import Store

from ...core.errors import EplbError, RankLostError, TransferError, UndecidedError
from .rank_group import RankGroup
from .scheduling import Scheduler, Switch

__all__ = ["DecisionStore", "Store", "TwoPhaseCommit"]

_logger = logging.getLogger(__name__)

# Votes in place of a step.
_CORRUPTED = -1
_NO_STORE = -2

_KEEP = "keep"
_OFF = "off"  # key of the reason why balancing ended
_PIECES = 20  # of a time limit

_Call: TypeAlias = tuple[Callable[[], Any], "Future[Any]"]


class TwoPhaseCommit:
    """Commits of one rank; see the table above.

    Args:
        group: all ranks.
        store: compare-and-set store that all ranks reach; None for a lone rank.
        time_limit: seconds for each phase of a commit: for the vote, and for an answer of the store.

    Attributes:
        decisions: in the store.
    """

    def __init__(self, group: RankGroup, store: Store | None, time_limit: float) -> None:
        self._group = group
        self._time_limit = time_limit
        self.decisions = DecisionStore(store, time_limit)

    def commit(
        self,
        name: str,
        switches: Sequence[Switch],
        scheduler: Scheduler,
        *,
        error: Exception | None = None,
        num_corrupted: int = 0,
    ) -> float | None:
        """All ranks: do `switches` from the same step on, if all ranks are ready.

        Args:
            name: of the migration batch; the same on every rank, never used before.
            switches: the first at the decided step, each of the others one step later.
            scheduler: has the serving thread do them.
            error: why this rank failed to stage the batch.
            num_corrupted: experts that arrived corrupted on this rank.

        Returns:
            Seconds that the switches took; None if arrivals on some rank are corrupted. Then nothing changed.

        Raises:
            TransferError: on all ranks, when one of them failed; nothing changed. RankLostError: a rank does
            not answer, or its store does not. UndecidedError: this rank cannot know, or could not do, what
            was decided.
        """
        phase = f"committing {name}"
        # Throttled ranks are ready at different times, and serving must not wait for that at a fence.
        if scheduler.round_bytes is not None and any(self._vote(phase, error, num_corrupted)):
            return None

        # 1. Vote.
        scheduler.throttle.ranks_met()
        store_answers = self.decisions.answers()
        fence = scheduler.propose_step()
        vote = _NO_STORE if not store_answers else _CORRUPTED if num_corrupted else fence
        lost: Exception | None = None
        try:
            votes = self._vote(phase, error, vote)
        except Exception as caught:
            failed_somewhere = isinstance(caught, EplbError) and not isinstance(caught, RankLostError)
            if failed_somewhere or vote < 0 or error is not None:
                scheduler.release(None)
                raise
            lost = caught  # other ranks may have all votes
            votes = []
        if _NO_STORE in votes:
            scheduler.release(None)
            silent = [rank for rank, vote in enumerate(votes) if vote == _NO_STORE]
            raise RankLostError(f"ranks {silent} cannot reach the store, which decides every commit")
        if _CORRUPTED in votes:
            scheduler.release(None)
            return None

        # 2. Decide.
        try:
            decision = self.decisions.decide(name, _KEEP if lost is not None else str(max(votes)))
            if decision == _KEEP:
                raise lost or RankLostError("a rank could not be reached when all were ready to switch")
            # 3. Switch.
            seconds = scheduler.release(int(decision), switches)
        except Exception as failure:
            if failure is lost or isinstance(failure, EplbError):
                raise
            raise UndecidedError(f"this rank did not switch as was decided: {failure}") from failure
        if lost is not None:
            raise lost
        return seconds

    def give_up(self, reason: str) -> str:
        """The reason why balancing ends, the same on all ranks: that of the first rank to call this.

        A rank whose store does not answer gets its own.
        """
        with suppress(UndecidedError):
            return self.decisions.decide(_OFF, reason)
        return reason

    def _vote(self, phase: str, error: Exception | None, value: int) -> list[int]:
        return self._group.vote(phase, error, value, TransferError, time_limit=self._time_limit)


class DecisionStore:
    """Decisions in a key-value store: the first rank to write one takes it for all.

    Args:
        store: None for a lone rank, which decides everything itself.
        time_limit: seconds to wait for an answer.
    """

    def __init__(self, store: Store | None, time_limit: float) -> None:
        self._store = store
        self._time_limit = time_limit
        self._keys: list[str] = []
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._last: Future[Any] | None = None
        if store is not None:
            # Started now: when a decision is due, the process may have no thread left.
            threading.Thread(target=_serve, args=(self._calls,), name="eplb-decisions", daemon=True).start()

    def decide(self, key: str, proposal: str) -> str:
        """The decision for `key`: `proposal`, unless another rank was first.

        Raises:
            UndecidedError: the store does not answer.
        """
        store = self._store
        if store is None:
            return proposal
        self._keys.append(key)
        try:
            answer: bytes = self._ask(lambda: store.compare_set(key, "", proposal))
        except Exception as error:
            raise UndecidedError(f"the store cannot be asked for {key}: {error}") from error
        return answer.decode()

    def answers(self) -> bool:
        """Whether the store answers; to be known before anything depends on it."""
        store = self._store
        try:
            return store is None or bool(self._ask(lambda: [store.check(["any"])]))
        except Exception as error:
            _logger.warning("the store, which decides every commit, does not answer: %s", error)
            return False

    def forget(self, *, delete: bool) -> None:
        """Forget all keys so far, once all ranks have read them; `delete`, on one rank, removes them from the
        store too, if it answers."""
        store, keys = self._store, self._keys
        self._keys = []
        if delete and store is not None and keys:
            with suppress(Exception):
                self._ask(lambda: [store.delete_key(key) for key in keys])

    def close(self) -> None:
        """Ask nothing any more; ends the thread that asks."""
        self._calls.put(None)

    def _ask(self, action: Callable[[], Any]) -> Any:
        """The result of `action`, run in another thread: the client of the store has no time limit."""
        if self._last is not None and not self._last.done():
            raise TimeoutError("no answer to an earlier question either")
        answer = self._last = Future[Any]()
        self._calls.put((action, answer))
        # In pieces: the time in which this process was stopped (SIGSTOP) must not count.
        for _ in range(_PIECES):
            if wait([answer], self._time_limit / _PIECES).done:
                return answer.result()
        raise TimeoutError(f"no answer within {self._time_limit:g} s")


def _serve(calls: SimpleQueue[_Call | None]) -> None:
    while (call := calls.get()) is not None:
        action, answer = call
        try:
            answer.set_result(action())
        except Exception as error:
            answer.set_exception(error)
