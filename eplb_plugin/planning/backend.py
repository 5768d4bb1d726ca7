"""Which of the two implementations plans: compiled kernels or tensors."""

from __future__ import annotations

import torch

from ..config.options import PlannerOptions

__all__ = ["use_kernels"]


def use_kernels(load: torch.Tensor, options: PlannerOptions, has_current: bool = False) -> bool:
    """Kernels for loads on the CPU, and on any device to grow from a placement in force.

    On a GPU the tensor version spares the copy to the host; but it plans from scratch alone, and one small
    copy is nothing against the weights that a plan from scratch moves. Only the tensor version knows the
    objective `spread`.
    """
    return options.objective == "peak" and (load.device.type == "cpu" or has_current)
