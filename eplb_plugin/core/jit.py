"""Compiled functions with a cache on disk, where a folder for it can be written."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numba

__all__ = ["cached_njit"]

_log = logging.getLogger(__name__)
_warned: list[str] = []


def cached_njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit(cache=True, **options)`.

    Without a writable folder for the cache, every process compiles the function anew, and logs one warning.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError as error:  # numba looks for a folder when it decorates
            if not _warned:
                _log.warning(
                    "compiled code cannot be kept on disk: each process compiles it anew, for up to minutes; "
                    "set NUMBA_CACHE_DIR to a writable folder (numba: %s)",
                    error,
                )
            _warned.append(str(error))
            return numba.njit(**options)(function)

    return decorate
