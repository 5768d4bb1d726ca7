"""The one place that checks a load before anything is computed from it."""

from __future__ import annotations

import numpy as np
import torch

from .errors import LoadError

__all__ = ["as_snapshots", "sum_over_last"]

_OF_NUMPY = (torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int16, torch.uint8)


def as_snapshots(load: torch.Tensor, name: str = "load") -> torch.Tensor:
    """Check a load and give it its snapshot axis.

    Args:
        load: [layers, logical] or [snapshots, layers, logical], tokens; any integer or float dtype.
        name: what to call it in errors.

    Returns:
        float64 [snapshots, layers, logical] on the device of `load`, never the same memory.

    Raises:
        LoadError: wrong shape or dtype, NaN, infinite or negative values, or some too large to be added up.
    """
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
    if out.dim() == 2:
        out = out.unsqueeze(0)
    # One pass each over what is nearly always fine; NaN makes both of them NaN.
    values = out.numpy() if out.device.type == "cpu" else out
    least, most = float(values.min()), float(values.max())
    if not (least >= 0 and most < float("inf")):
        bad = ~(torch.isfinite(out) & (out >= 0))
        snapshot, layer, expert = (int(x) for x in bad.nonzero()[0])
        raise LoadError(
            f"{name} of snapshot {snapshot}, layer {layer}, expert {expert} is "
            f"{float(out[snapshot, layer, expert])}; {int(bad.sum())} of {out.numel()} values are "
            "NaN, infinite or negative"
        )
    if most * out.numel() == float("inf"):
        raise LoadError(
            f"{name} has the value {most:g}: sums of {out.numel()} such values are beyond float64"
        )
    return out


def sum_over_last(load: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension of a float64 tensor.

    On the CPU by numpy, as elsewhere in this file: torch would wake its threads for it, which go on spinning
    for milliseconds, on cores that planning and the engine need.
    """
    if load.device.type == "cpu":
        return torch.from_numpy(load.numpy().sum(-1))
    return load.sum(-1)


def _in_float64(load: torch.Tensor) -> torch.Tensor:
    """A copy; types that numpy lacks, bfloat16 for one, are left to torch."""
    if load.device.type == "cpu" and load.dtype in _OF_NUMPY:
        return torch.from_numpy(load.numpy().astype(np.float64))
    return load.to(torch.float64, copy=True)
