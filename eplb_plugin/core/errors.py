"""Exceptions for users of the package. Messages name the numbers that break a rule."""

from __future__ import annotations

import operator
import reprlib
from typing import SupportsIndex

__all__ = [
    "AgreementError",
    "ConfigError",
    "EplbError",
    "LoadError",
    "PlacementError",
    "RankLostError",
    "TopologyError",
    "TraceError",
    "TransferError",
    "UndecidedError",
    "checked_integer",
]


class EplbError(Exception):
    """Base class of all errors of this package."""


class ConfigError(EplbError, ValueError):
    """An option is unknown or has a value outside its range."""


class TopologyError(EplbError, ValueError):
    """Numbers of nodes, ranks, slots, groups or experts contradict each other."""


class LoadError(EplbError, ValueError):
    """A load has the wrong shape or dtype, or holds NaN, infinite or negative values."""


class PlacementError(EplbError, ValueError):
    """A placement has no replica of an expert, an unknown expert, or the wrong shape."""


class TraceError(EplbError, ValueError):
    """A file is missing, damaged, too large or of another format."""


class TransferError(EplbError, RuntimeError):
    """Expert weights could not be moved; the placement in force is unchanged."""


class AgreementError(EplbError, RuntimeError):
    """Ranks hold different plans; nothing was moved."""


class RankLostError(EplbError, RuntimeError):
    """Another rank died, or did not answer within the time limit."""


class UndecidedError(RankLostError):
    """The decision of a commit did not reach this rank. Further serving could give wrong tokens."""


def checked_integer(
    name: str, value: SupportsIndex, error: type[EplbError], *, least: int = 1, most: int | None = None
) -> int:
    """Convert an integer of any type, Python's or NumPy's but no bool, to a Python int.

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
