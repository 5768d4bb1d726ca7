"""The policy for a vLLM that hands its policies the window itself (`plan_rebalance`, proposed upstream)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..common.options import EngineOptions
from .policy import Interval, VllmPolicy

__all__ = ["VllmHookPolicy", "has_hook"]


def has_hook(abstract_policy: type) -> bool:
    """Whether vLLM's abstract policy knows `plan_rebalance`."""
    return callable(getattr(abstract_policy, "plan_rebalance", None))


class VllmHookPolicy(VllmPolicy):
    """Takes the load window, summed over the ranks and in time order, and the map from vLLM's context.

    Nothing of vLLM's state is wrapped for it. vLLM keeps one policy state per model, and makes new ones
    when the group of ranks changes; each has a history of its own.

    Args:
        options: of the planner and its window.
        own: an instance of vLLM's own policy, for what is not ours: a group that grows or shrinks.
        make_plan: makes vLLM's plan from the map, int64 [layers, slots].
        speaks: whether this rank writes the log line of each rebalance.
    """

    def __init__(
        self, options: EngineOptions, own: Any, make_plan: Callable[[torch.Tensor], Any], speaks: bool = True
    ) -> None:
        super().__init__(options, own, speaks=speaks)
        self._make_plan = make_plan
        self._names: WeakKeyDictionary[Any, str] = WeakKeyDictionary()

    def create_state(self, num_moe_layers: int) -> Any:
        """vLLM's own state object for one model."""
        state = self.own.create_state(num_moe_layers)
        self._names[state] = f"model {len(self.planners) + len(self._names)}"
        return state

    def plan_rebalance(self, context: Any, policy_state: Any = None) -> Any:
        """vLLM's plan for its context: `load_window_cpu` [samples, layers, logical],
        `physical_to_logical_map_cpu` [layers, slots], `num_replicas`, `topology` and `cpu_group`."""
        old = context.physical_to_logical_map_cpu
        if old.shape[1] != context.num_replicas or bool((old < 0).any()):
            return self.own.plan_rebalance(context, policy_state)
        if self.options.check_agreement:
            self._group = lambda: context.cpu_group
        name = "model" if policy_state is None else self._names.get(policy_state, "model")
        where = context.topology
        ids = self.rearrange(
            Interval(name, context.load_window_cpu),
            old,
            context.num_replicas,
            where.num_groups,
            where.num_nodes,
            where.num_ranks,
        )
        return self._make_plan(ids)

    def on_layer_committed(self, policy_state: Any, plan: Any, layer_idx: int) -> None:
        """Nothing to note: the next context holds the map in force."""
