"""Exceptions for users of the package. Messages name the numbers that break a rule."""

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
