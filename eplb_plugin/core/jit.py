"""How compiled functions are kept on disk, where there is a place for them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numba

__all__ = ["cached_njit"]

_log = logging.getLogger(__name__)
_warned: list[str] = []


def cached_njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit(cache=True, **options)`. Where no folder for the cache can be written to, the function is
    compiled anew in every process, and a warning is logged once in each."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError as error:  # numba looks for a folder when it decorates
            _warn_of_no_cache(str(error))
            return numba.njit(**options)(function)

    return decorate


def _warn_of_no_cache(reason: str) -> None:
    if not _warned:
        _log.warning(
            "compiled code cannot be kept on disk, so this process compiles it anew, for up to minutes; "
            "set NUMBA_CACHE_DIR to a folder that can be written to (numba: %s)",
            reason,
        )
    _warned.append(reason)
