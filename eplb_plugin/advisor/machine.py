"""Cost of moves and replicas on a machine, for experts of a given size."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.errors import ConfigError
from ..core.topology import Topology
from .trial import Setting, Trial

__all__ = ["Cost", "Machine"]


@dataclass(frozen=True)
class Cost:
    """Cost of a setting.

    Attributes:
        bytes_per_hour: transferred weights, over all ranks.
        transfer_seconds: transfer time of one rebalance, on the links of the busiest rank.
        transfer_share: `transfer_seconds` as a share of the time between two rebalances.
        replica_bytes: memory of redundant experts, per rank.
    """

    bytes_per_hour: float
    transfer_seconds: float
    transfer_share: float
    replica_bytes: float


@dataclass(frozen=True, kw_only=True)
class Machine:
    """An expert-parallel group and its links.

    Attributes:
        ranks: ranks of the group.
        nodes: nodes of the group.
        groups: groups of logical experts per layer.
        bytes_per_expert: size of one expert's weights.
        bandwidth: of a rank within its node, in bytes per second and direction.
        node_bandwidth: of a rank to other nodes, in bytes per second and direction.
        step_seconds: duration of an engine step.

    Raises:
        ConfigError: a size, bandwidth or duration is not above 0 or not finite.
    """

    ranks: int
    nodes: int
    groups: int
    bytes_per_expert: float
    bandwidth: float
    node_bandwidth: float
    step_seconds: float

    def __post_init__(self) -> None:
        for name in ("bytes_per_expert", "bandwidth", "node_bandwidth", "step_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)} is not above 0")

    def topology(self, slots: int) -> Topology:
        """The group with `slots` slots.

        Raises:
            TopologyError: the numbers contradict each other.
        """
        return Topology(num_nodes=self.nodes, num_ranks=self.ranks, num_slots=slots, num_groups=self.groups)

    def cost(self, trial: Trial, setting: Setting, num_experts: int, num_layers: int) -> Cost:
        """Cost of a setting, without its first rebalance from the default placement.

        Example: 10 transfers of 10 MB over 400 GB/s take 0.25 ms; with 100 steps of 40 ms between two
        rebalances, that is a share of 0.006%.
        """
        between = setting.interval * self.step_seconds
        size = self.bytes_per_expert
        seconds = size * (trial.busiest_within / self.bandwidth + trial.busiest_between / self.node_bandwidth)
        spare = setting.slots // self.ranks - -(-num_experts // self.ranks)
        return Cost(
            bytes_per_hour=trial.moves * size * 3600 / between,
            transfer_seconds=seconds,
            transfer_share=seconds / between,
            replica_bytes=spare * num_layers * size,
        )
