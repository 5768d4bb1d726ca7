"""Validation of integers of any type: Python's, NumPy's, but no bool."""

from __future__ import annotations

import operator
import reprlib
from typing import SupportsIndex

from .errors import EplbError

__all__ = ["checked_integer"]


def checked_integer(
    name: str, value: SupportsIndex, error: type[EplbError], *, least: int = 1, most: int | None = None
) -> int:
    """Convert `value` to a Python int.

    Raises:
        EplbError: of the type `error`, with `name`: not an integer, or outside `least..most`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise error(f"{name}={reprlib.repr(value)} is not an integer")
    if most is not None and number > most:
        raise error(f"{name} is above {most}")
    if number < least:
        raise error(f"{name}={number} is below {least}")
    return number
