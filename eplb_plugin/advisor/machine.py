"""What moves and replicas cost on a machine, for experts of a given size."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.errors import ConfigError
from ..core.topology import Topology
from .trial import Setting, Trial

__all__ = ["Cost", "Machine"]


@dataclass(frozen=True)
class Cost:
    """What a setting costs.

    Attributes:
        bytes_per_hour: weights sent over all ranks.
        transfer_seconds: of one rebalance, on the links of the busiest rank.
        transfer_share: of the time between two rebalances in which that rank's links carry weights.
        replica_bytes: memory per rank that redundant experts take.
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
        nodes: nodes that they are spread over.
        groups: groups of experts per layer.
        bytes_per_expert: size of one expert's weights.
        bandwidth: of a rank within its node, in bytes per second in each direction.
        node_bandwidth: of a rank to other nodes, the same.
        step_seconds: duration of an engine step.

    Raises:
        ConfigError: a size, bandwidth or duration is not above 0.
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
        """The group with this many slots.

        Raises:
            TopologyError: the numbers do not fit together.
        """
        return Topology(num_nodes=self.nodes, num_ranks=self.ranks, num_slots=slots, num_groups=self.groups)

    def cost(self, trial: Trial, setting: Setting, num_experts: int, num_layers: int) -> Cost:
        """What a setting costs in the long run, its first rebalance left out."""
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
