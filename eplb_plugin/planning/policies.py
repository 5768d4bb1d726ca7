"""The contract of a policy, and the registry of their names.

A new policy is one file beside `greedy.py`, and one line in `POLICIES`. The planner, the online loop, the
engine adapters, `simulate` and the benchmarks then take its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch

from ..config.options import PlannerOptions
from ..core.errors import ConfigError
from ..core.placement import Placement
from ..core.topology import Topology
from .adaptive import Adaptive
from .ensemble import Ensemble
from .greedy import Greedy

__all__ = ["POLICIES", "Policy", "Registration", "policy_for"]


class Policy(Protocol):
    """What makes a placement: a pure function, the same placement for the same input everywhere."""

    def __call__(self, window: torch.Tensor, topology: Topology, current: Placement | None) -> Placement:
        """Place the experts of every layer.

        Args:
            window: float64 [snapshots, layers, logical] in time order, tokens, checked. `plan` passes the
                expected load, on the device of its input.
            topology: nodes, ranks, slots and groups; without dead ranks, and of one node and group where the
                hierarchical policy does not fit.
            current: the placement in force, complete; None without one. On the CPU. Where slots were empty or
                experts missing it is a `CompletedPlacement`, which still knows them.

        Returns:
            A placement without empty slots, on any device.
        """


class Registration(NamedTuple):
    """How a policy is made, and whether it starts from the placement in force and so can keep `max_moves`."""

    make: Callable[[PlannerOptions], Policy]
    keeps_max_moves: bool = False


POLICIES: Mapping[str, Registration] = MappingProxyType(
    {
        "adaptive": Registration(Adaptive, keeps_max_moves=True),
        "ensemble": Registration(Ensemble),
        "greedy": Registration(Greedy),
    }
)
"""Every policy by its name in `PlannerOptions.policy`."""


def policy_for(options: PlannerOptions) -> Policy:
    """The policy that `options` name. Cheap: called early, it refuses bad options before any work is done.

    Raises:
        ConfigError: an unknown policy, or `max_moves` for a policy that plans from scratch.
    """
    entry = POLICIES.get(options.policy)
    if entry is None:
        raise ConfigError(f"policy={options.policy!r} is unknown; there are {', '.join(POLICIES)}")
    if options.max_moves is not None and not entry.keeps_max_moves:
        raise ConfigError(
            f"max_moves={options.max_moves} cannot be kept: policy={options.policy!r} plans from scratch"
        )
    return entry.make(options)
