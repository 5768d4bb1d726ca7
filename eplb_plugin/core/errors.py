"""The exceptions that users of the package see; every message carries the numbers that broke the rule."""

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
    """Numbers of nodes, ranks, slots, groups and experts that do not fit together."""


class LoadError(EplbError, ValueError):
    """A load has the wrong shape or dtype, or holds NaN, infinite or negative values."""


class PlacementError(EplbError, ValueError):
    """A placement leaves an expert without a replica, names an unknown one, or has the wrong shape."""


class TraceError(EplbError, ValueError):
    """A trace file is not what it claims to be."""


class TransferError(EplbError, RuntimeError):
    """Expert weights could not be moved; the placement in force is unchanged."""


class AgreementError(EplbError, RuntimeError):
    """Ranks that must hold the same plan hold different ones; nothing was moved."""


class RankLostError(EplbError, RuntimeError):
    """Another rank died, or did not answer within the time limit."""


class UndecidedError(RankLostError):
    """This rank cannot learn whether the others switched over. Serving on might give wrong tokens."""
