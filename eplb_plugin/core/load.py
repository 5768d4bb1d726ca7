"""The one place that checks a load before anything is computed from it."""

from __future__ import annotations

import numpy as np
import torch

from .errors import LoadError

__all__ = ["as_snapshots", "check_values", "fold_steps", "sum_over_last", "to_snapshots", "zero_if_bad"]

_OF_NUMPY = (torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int16, torch.uint8)


def as_snapshots(load: torch.Tensor, name: str = "load") -> torch.Tensor:
    """Check a load and give it its snapshot axis.

    Args:
        load: [layers, logical] or [snapshots, layers, logical], tokens; any integer or float dtype.
        name: what to call it in errors.

    Returns:
        float64 [snapshots, layers, logical] on the device of `load`, contiguous, never the same memory.

    Raises:
        LoadError: wrong shape or dtype, NaN, infinite or negative values, or some too large to be added up.
    """
    out = to_snapshots(load, name)
    check_values(out, name=name)
    return out


def to_snapshots(load: torch.Tensor, name: str = "load") -> torch.Tensor:
    """`as_snapshots` without a look at the values, which would wait for the device: LoadError for a wrong
    shape or dtype alone. What is computed from it counts only after `check_values`."""
    if not isinstance(load, torch.Tensor):
        raise LoadError(f"{name} is a {type(load).__name__}, not a tensor")
    if load.layout != torch.strided or load.is_nested or load.is_quantized or load.is_meta:
        raise LoadError(f"{name} is sparse, nested, quantized or without values, not a plain tensor")
    if load.dim() not in (2, 3) or load.numel() == 0:
        raise LoadError(
            f"{name} has shape {tuple(load.shape)}, not [layers, logical] or [snapshots, layers, logical]"
        )
    if load.dtype == torch.bool or load.is_complex():
        raise LoadError(f"{name} has dtype {load.dtype}, not an integer or a float")
    out = _in_float64(load.detach())
    return out.unsqueeze(0) if out.dim() == 2 else out


def zero_if_bad(snapshots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A load to compute with before its values are checked: zeros wherever `check_values` will raise.

    Returns:
        The load or zeros, and its least and largest value, float64 of no dimension, on its device.
    """
    least, most = torch.aminmax(snapshots)
    fine = (least >= 0) & (most * snapshots.numel() < float("inf"))
    return torch.where(fine, snapshots, 0.0), least, most


def check_values(
    snapshots: torch.Tensor, least: float | None = None, most: float | None = None, name: str = "load"
) -> None:
    """Raise LoadError if there are values that are no load.

    Args:
        snapshots: float64 [snapshots, layers, logical] from `to_snapshots`.
        least, most: its least and its largest value, where they are known; NaN among them makes both NaN.
        name: what to call it in errors.
    """
    if least is None or most is None:
        least, most = _extremes(snapshots)
    if not (least >= 0 and most < float("inf")):
        bad = ~(torch.isfinite(snapshots) & (snapshots >= 0))
        snapshot, layer, expert = (int(x) for x in bad.nonzero()[0])
        raise LoadError(
            f"{name} of snapshot {snapshot}, layer {layer}, expert {expert} is "
            f"{float(snapshots[snapshot, layer, expert])}; {int(bad.sum())} of {snapshots.numel()} values "
            "are NaN, infinite or negative"
        )
    if most * snapshots.numel() == float("inf"):
        raise LoadError(
            f"{name} has the value {most:g}: sums of {snapshots.numel()} such values are beyond float64"
        )


def sum_over_last(load: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension of a float64 tensor.

    On the CPU by numpy, as elsewhere in this file: torch would wake its threads for it, which go on spinning
    for milliseconds, on cores that planning and the engine need.
    """
    if load.device.type == "cpu":
        return torch.from_numpy(load.numpy().sum(-1))
    return load.sum(-1)


def fold_steps(load: torch.Tensor, snapshots: int) -> torch.Tensor:
    """Sum neighbouring steps that are all there already, as the load window does one by one.

    Args:
        load: [steps, layers, logical], tokens.
        snapshots: snapshots to make, at most.

    Returns:
        int64 or float64 [min(snapshots, steps), layers, logical] in time order, on the device of `load`.
    """
    steps = load.shape[0]
    count = min(snapshots, steps)
    index = torch.arange(steps, device=load.device) * count // steps
    wide = load.to(torch.float64 if load.is_floating_point() else torch.int64)
    return wide.new_zeros(count, *load.shape[1:]).index_add_(0, index, wide)


def _extremes(snapshots: torch.Tensor) -> tuple[float, float]:
    values = snapshots.numpy() if snapshots.device.type == "cpu" else snapshots
    return float(values.min()), float(values.max())


def _in_float64(load: torch.Tensor) -> torch.Tensor:
    """A contiguous copy, since the order of a sum follows strides; types that numpy lacks, bfloat16 for one,
    are left to torch."""
    if load.device.type == "cpu" and load.dtype in _OF_NUMPY:
        return torch.from_numpy(load.numpy().astype(np.float64, order="C"))
    return load.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
