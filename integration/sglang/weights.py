"""Which tensors of an expert SGLang does not move when it rebalances."""

from __future__ import annotations

import logging
from typing import Any

from ...runtime.verify.unregistered import warn_unregistered
from .policy import is_first_rank

__all__ = ["warn_unmoved"]

_logger = logging.getLogger(__name__)


def warn_unmoved(manager: Any) -> None:
    """Warn, on the first rank, of tensors that look like an expert's and that SGLang will not move.

    To be called when SGLang is about to move them: it keeps what the model says when first asked, which
    before the model is loaded would be the wrong tensors. Raises nothing.

    Args:
        manager: SGLang's EPLBManager.
    """
    if not is_first_rank():
        return
    try:
        from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

        model = manager._get_model()
        moved = model.routed_experts_weights_of_layer
        experts = {part.layer_id: part for part in model.modules() if isinstance(part, FusedMoE)}
        layers = sorted(experts.keys() & moved.keys())
        if layers:
            slots = experts[layers[0]].num_local_experts
            warn_unregistered([experts[n] for n in layers], [moved[n] for n in layers], slots, layers)
    except Exception:
        _logger.exception("whether SGLang moves all weights of the experts could not be checked; it goes on")
