"""The price of a move in seconds: the time of its transfer against the time that it saves in a layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from ..config.options import PlannerOptions
from ..core.errors import ConfigError
from ..core.topology import Topology

__all__ = ["EXPERT_SHARE", "MoveCost", "default_bandwidth", "serving_share", "with_price"]

EXPERT_SHARE = 0.5
"""Share of a step that the experts take on balanced ranks: an assumption."""

_BACKGROUND_SHARE = 0.1  # of transfers beside the steps; bench_stall.py measures 0.05 to 0.08
_BUSIEST = 2.0  # measured: transfers of the busiest rank over the mean, 1.3 on 4 ranks to 2.5 on 32
_LASTING = 4.0  # measured: intervals for which the gain of a move lasts where traffic drifts
_LEAST, _MOST = 0.002, 0.128  # measured: below, prices follow chance; above, badly placed experts stay
_WITHIN_NODE, _BETWEEN_NODES = 400e9, 45e9  # bytes per second: NVLink of an H100, and 400 Gbit/s


@dataclass(frozen=True, kw_only=True)
class MoveCost:
    """What a move costs and gains, in seconds.

    Ranks transfer in parallel, so a rebalance takes as long as its busiest rank:

        move_seconds  = serving_share * 2 * expert_bytes / bandwidth / num_ranks
        layer_seconds = 0.5 * step_seconds / num_layers
        rank_price    = move_seconds / (layer_seconds * 4 * interval)

    A move has to lower the peak by `rank_price`, as a fraction of the mean rank load. A gain of 1 % of that
    load saves 1 % of `layer_seconds` in each step.

    Example: DeepSeek-V3, experts of 44 MB, 32 ranks with 45 GB/s, 58 layers, steps of 40 ms, an interval of
    256 steps, transfers within a step. A move takes 61 us. The experts of a layer take 345 us, in 1,024 steps
    353 ms. `rank_price` is 0.00017, a `move_price` of 0.0016 with 9 slots a rank, and 0.002 after rounding.

    Attributes:
        expert_bytes: weights of one expert of one layer.
        bandwidth: of a rank to other ranks, in bytes per second and direction.
        num_ranks: ranks of the group.
        num_layers: MoE layers.
        step_seconds: duration of a forward step.
        interval: steps between two rebalances.
        serving_share: share of a transfer that serving loses; 1: the engine waits for it.

    Raises:
        ConfigError: a number is not above 0, or not finite.
    """

    expert_bytes: float
    bandwidth: float
    num_ranks: int
    num_layers: int
    step_seconds: float
    interval: int
    serving_share: float = 1.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not 0 < value < math.inf:
                raise ConfigError(f"{item.name}={value} is not above 0 and finite")

    @property
    def move_seconds(self) -> float:
        """Time that serving loses by one move, on the mean."""
        seconds = _BUSIEST * self.expert_bytes / self.bandwidth / self.num_ranks
        return self.serving_share * seconds

    @property
    def rank_price(self) -> float:
        """Reduction of a layer's peak that pays for one move, as a fraction of the mean rank load."""
        layer_seconds = EXPERT_SHARE * self.step_seconds / self.num_layers
        return self.move_seconds / (layer_seconds * _LASTING * self.interval)

    def move_price(self, topology: Topology) -> float:
        """`planner.move_price` for `rank_price`: 0.002 times a power of two, 0.128 at most.

        Measured times vary, and prices a third apart serve equally well: rounding keeps plans the same.
        """
        exact = self.rank_price * topology.num_slots / topology.num_ranks
        price = _LEAST
        while price < _MOST and exact > math.sqrt(2) * price:
            price *= 2
        return price

    def gain_seconds(self, before: float, after: float) -> float:
        """Expected fall of the slowest rank's time over one interval, by moves between two placements.

        Example: balancedness 0.8 before and 0.9 after, steps of 40 ms, an interval of 256 steps. Experts take
        20 ms a step over the balancedness: 25 ms before, 22.2 ms after. The gain is 711 ms.

        Args:
            before, after: balancedness of both.
        """
        return EXPERT_SHARE * self.step_seconds * self.interval * (1 / before - 1 / after)


def default_bandwidth(topology: Topology, option: float | None) -> float:
    """Bytes per second of a rank to other ranks, per direction; `option`: `rebalancer.bandwidth`, in GB/s."""
    if option is not None:
        return 1e9 * option
    return _WITHIN_NODE if topology.num_nodes == 1 else _BETWEEN_NODES


def serving_share(mode: Literal["async", "sync", "observe"]) -> float:
    """Share of a transfer that serving loses: all of it in the mode `sync`, a tenth in `async`."""
    return 1.0 if mode == "sync" else _BACKGROUND_SHARE


def with_price(options: PlannerOptions, cost: MoveCost | None, topology: Topology) -> PlannerOptions:
    """The options with a number for `move_price: auto`; unchanged without a known cost, or with a number."""
    if cost is None or options.move_price != "auto":
        return options
    return options.model_copy(update={"move_price": cost.move_price(topology)})
