"""What vLLM's `EplbState` knows and the policy does not: steps, and the size of weights."""

from __future__ import annotations

import functools
from typing import Any

from ...observability.prometheus import Telemetry
from ..common.telemetry import bytes_of_one_expert

__all__ = ["count_steps", "expert_bytes"]


def count_steps(state: Any, telemetry: Telemetry) -> None:
    """Have `state` count its forward steps, but for profiling ones. Only this object is changed."""
    step = state.step

    @functools.wraps(step)
    def counting(is_dummy: bool = False, is_profile: bool = False, *args: Any, **kwargs: Any) -> Any:
        # Before: the step may end with a rebalance, which starts the count anew.
        if not is_profile:
            telemetry.stepped()
        return step(is_dummy, is_profile, *args, **kwargs)

    state.step = counting


def expert_bytes(model: Any) -> dict[int, int]:
    """Bytes of an expert's weights, by MoE layer, of a model with vLLM's `expert_weights`."""
    return {layer: bytes_of_one_expert(tensors) for layer, tensors in enumerate(model.expert_weights)}
