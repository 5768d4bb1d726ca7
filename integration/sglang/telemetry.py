"""What SGLang's manager knows and the algorithm does not: forward passes, and the size of weights."""

from __future__ import annotations

from typing import Any

from ..common.telemetry import bytes_of_one_expert, engine_telemetry
from .policy import SglangBalancer, is_first_rank

__all__ = ["watch"]


def watch(manager: Any, balancer: SglangBalancer) -> None:
    """Show what `balancer` does on SGLang's `/metrics`, if its options say so and this is the first rank.

    Args:
        manager: SGLang's EPLBManager, of which this object alone is changed.
        balancer: gets the telemetry.
    """
    telemetry = engine_telemetry(balancer.options, is_first_rank())
    if telemetry is None:
        return
    model = telemetry.of(_model_name())
    pass_ended = manager.on_forward_pass_end

    def counting() -> None:
        # Before: the pass may end with a rebalance, which starts the count anew.
        model.stepped()
        pass_ended()

    def expert_bytes() -> dict[int, int]:
        layers = manager._get_model().routed_experts_weights_of_layer
        return {layer: bytes_of_one_expert(tensors) for layer, tensors in layers.items()}

    manager.on_forward_pass_end = counting
    balancer.planner.telemetry = model
    balancer.expert_bytes = expert_bytes


def _model_name() -> str:
    """The name under which SGLang's own metrics show the model."""
    from sglang.srt.runtime_context import get_serving

    return str(get_serving().served_model_name)
