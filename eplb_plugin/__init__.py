"""Expert-parallel load balancing for mixture-of-experts serving engines."""

from typing import TYPE_CHECKING

from .config.options import EnsembleOptions, MetricsOptions, PlannerOptions, RebalancerOptions
from .core.balancedness import balancedness, count_moves, rank_loads
from .core.errors import (
    AgreementError,
    ConfigError,
    EplbError,
    LoadError,
    PlacementError,
    RankLostError,
    TopologyError,
    TraceError,
    TransferError,
    UndecidedError,
)
from .core.placement import Placement
from .core.topology import Topology
from .dispatch.balance_batch import balance_batch
from .observability.server import MetricsServer, serve_metrics
from .planning.ensemble import balanced_packing
from .planning.planner import Plan, plan, rebalance_experts, warmup
from .runtime.rebalancer import Rebalancer, RebalanceReport
from .runtime.startup import regroup
from .runtime.weights.migration import MigrationPlan, plan_migration

__all__ = [
    # plan
    "balanced_packing",
    "rebalance_experts",
    "plan",
    "Plan",
    "PlannerOptions",
    "EnsembleOptions",
    "warmup",
    # dispatch
    "balance_batch",
    # values
    "Topology",
    "Placement",
    # run
    "Rebalancer",
    "RebalanceReport",
    "RebalancerOptions",
    "regroup",
    # look
    "serve_metrics",
    "MetricsServer",
    "MetricsOptions",
    "balancedness",
    "count_moves",
    "rank_loads",
    "plan_migration",
    "MigrationPlan",
    # errors
    "EplbError",
    "AgreementError",
    "ConfigError",
    "LoadError",
    "PlacementError",
    "RankLostError",
    "TopologyError",
    "TraceError",
    "TransferError",
    "UndecidedError",
]

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        """`__version__`, looked up when asked for: a checkout that is not installed has none."""
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import version

        return version("eplb-plugin")
