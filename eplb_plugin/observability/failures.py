"""A log of failures that repeat: each cause is written once, with its traceback."""

from __future__ import annotations

import logging

__all__ = ["FailureLog"]


class FailureLog:
    """Keeps a failure that returns at each rebalance from filling the log.

    Example: a planner that raises the same `RuntimeError` at 500 rebalances gives one line.

    Args:
        logger: of the module that reports.
        subject: first words of each line, such as `rebalance`.
        consequence: last words of each line, such as `the placement in force stays`.
    """

    def __init__(self, logger: logging.Logger, subject: str, consequence: str) -> None:
        self._logger = logger
        self._subject = subject
        self._consequence = consequence
        self._known: set[str] = set()

    def add(self, error: Exception) -> str:
        """Log an error unless one of its type and message was logged before.

        Returns:
            The cause: type and message of the error on one line.
        """
        cause = f"{type(error).__name__}: {error}"
        if cause not in self._known:
            self._known.add(cause)
            line = f"{self._subject} failed: {cause}; {self._consequence}; this is said once"
            self._logger.error("%s", line, exc_info=error, stacklevel=2)
        return cause
