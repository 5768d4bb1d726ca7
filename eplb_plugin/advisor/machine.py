"""The models of `configs/models.yaml`, and the cost of moves and replicas on a machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

import yaml
from pydantic import Field

from ..config.options import Options
from ..core.errors import ConfigError
from ..core.topology import Topology
from ..dispatch.expert_cost import weight_bits
from ..planning.move_cost import MoveCost
from .trial import Setting, Trial

__all__ = ["Cost", "Machine", "ModelPreset", "model_preset", "model_presets", "models_of_shape"]


_SAME_SIZE = 0.1


class ModelPreset(Options):
    """The shape of a model's experts."""

    source: str
    """Source of the numbers."""

    layers: int = Field(ge=1)
    """MoE layers."""

    experts: int = Field(ge=1)
    """Logical experts per layer."""

    top_k: int = Field(ge=1)
    """Experts per token."""

    groups: int = Field(ge=1)
    """Groups of logical experts; 1 without group-limited routing."""

    hidden: int = Field(ge=1)
    """Size of the residual stream."""

    expert_hidden: int = Field(ge=1)
    """Inner size of each expert."""

    bits_per_weight: float = Field(gt=0)
    """Bits of a weight, including its share of the scales."""

    @property
    def parameters(self) -> Mapping[int, float]:
        """Parameters of an expert, by the bits of a weight, for `cost_in_tokens`."""
        return {weight_bits(self.bits_per_weight): 3.0 * self.hidden * self.expert_hidden}

    @property
    def bytes_per_expert(self) -> float:
        """Size of the gate, up and down projections of one expert."""
        return 3 * self.hidden * self.expert_hidden * self.bits_per_weight / 8


@cache
def model_presets() -> Mapping[str, ModelPreset]:
    """All presets, by name.

    Raises:
        ConfigError: the file is missing or malformed.
    """
    package = Path(__file__).resolve().parents[1]
    # Inside the package in a wheel, beside it in a checkout.
    paths = [folder / "configs" / "models.yaml" for folder in (package, package.parent)]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise ConfigError(f"{paths[0]}: no such file; the installation is not complete")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))["models"]
    return MappingProxyType({name: ModelPreset(**values) for name, values in content.items()})


def models_of_shape(layers: int, experts: int, expert_bytes: float = 0.0) -> list[str]:
    """Names of the presets with these MoE layers and experts; the first is the best guess.

    Args:
        layers: MoE layers with load.
        experts: logical experts per layer.
        expert_bytes: size of one expert; 0: unknown. A preset of another size, by a tenth or more, is none.
    """
    found = [
        (abs(preset.bytes_per_expert / expert_bytes - 1) if expert_bytes else 0.0, name)
        for name, preset in model_presets().items()
        if (preset.layers, preset.experts) == (layers, experts)
    ]
    return [name for error, name in sorted(found, key=lambda item: item[0]) if error < _SAME_SIZE]


def model_preset(name: str) -> ModelPreset:
    """The preset `name`.

    Raises:
        ConfigError: unknown name; the message lists the known ones.
    """
    try:
        return model_presets()[name]
    except KeyError:
        raise ConfigError(f"no model {name!r}; there are {', '.join(model_presets())}") from None


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
        expert_cost: least cost of a replica in use, in tokens.
        token_seconds: time of one token in one expert; None: unknown.
        message_seconds: time of the all-gather of counts, for each layer and batch; 0: none is needed.

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
    expert_cost: int = 0
    token_seconds: float | None = None
    message_seconds: float = 0.0

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

    def move_cost(self, num_layers: int, interval: int) -> MoveCost:
        """The cost of a move for `planner.move_price: auto`: of one that the engine waits for, as in `cost`.

        Of `nodes` nodes, all but one hold the sources of the transfers between nodes. Example: with 400 GB/s
        within and 45 GB/s between four nodes, a mean transfer has 54 GB/s.
        """
        apart = 1 - 1 / self.nodes
        return MoveCost(
            expert_bytes=self.bytes_per_expert,
            bandwidth=1 / (apart / self.node_bandwidth + (1 - apart) / self.bandwidth),
            num_ranks=self.ranks,
            num_layers=num_layers,
            step_seconds=self.step_seconds,
            interval=interval,
        )

    def with_dispatch(self, trial: Trial, rank_load: float) -> float | None:
        """Time of the experts with the even split over that with dispatch `balanced` and its message.

        The message is left out if the time of a token is unknown. None: dispatch was not judged.

        Args:
            trial: a setting on a load.
            rank_load: mean load of a rank in one layer and step, in tokens.
        """
        if trial.even_cost is None or trial.balanced_cost is None:
            return None
        message = 0.0
        if self.token_seconds is not None:
            # In the unit of the costs: the mean load of a rank.
            message = self.message_seconds / (rank_load * self.token_seconds)
        return trial.even_cost / (trial.balanced_cost + message)

    def cost(self, trial: Trial, setting: Setting, num_experts: int, num_layers: int) -> Cost:
        """Cost of a setting, without its first rebalance from the default placement.

        Example: 10 transfers of 10 MB over 400 GB/s take 0.25 ms. With 100 steps of 40 ms between two
        rebalances, the share is 0.006%.
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
