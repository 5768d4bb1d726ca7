"""Numbers that have to be whole, of whatever type they come."""

from __future__ import annotations

import operator
import reprlib
from typing import SupportsIndex

from .errors import EplbError

__all__ = ["checked_integer"]


def checked_integer(
    name: str, value: SupportsIndex, error: type[EplbError], *, least: int = 1, most: int | None = None
) -> int:
    """`value` as an int of Python's own: NumPy's integers become one.

    Raises:
        EplbError: of the type `error`, calling the value `name`: it is not an integer (a bool is none), or
            outside `least..most`.
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
