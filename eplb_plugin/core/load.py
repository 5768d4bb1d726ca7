"""The one place that checks a load before anything is computed from it, and makes its sums exact."""

from __future__ import annotations

import numpy as np
import torch

from .errors import LoadError

__all__ = ["as_snapshots", "fold_steps", "sum_over_last", "to_exact"]

_OF_NUMPY = (torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int16, torch.uint8)
_TOTAL_BITS = 50  # of the sum over a row and its snapshots: room for differences and doubling below 2^53


def as_snapshots(load: torch.Tensor, name: str = "load") -> torch.Tensor:
    """Check a load and give it its snapshot axis.

    Args:
        load: [layers, logical] or [snapshots, layers, logical], tokens; any integer or float dtype.
        name: the name of the tensor in errors.

    Returns:
        float64 [snapshots, layers, logical] on the device of `load`, contiguous, a copy.

    Raises:
        LoadError: wrong shape or dtype; NaN, infinite or negative values; values whose sum overflows.
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
    snapshots = _in_float64(load.detach())
    if snapshots.dim() == 2:
        snapshots = snapshots.unsqueeze(0)
    _check_values(snapshots, name)
    return snapshots


def sum_over_last(load: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension of a float64 tensor.

    On the CPU numpy sums. Torch would wake its threads, which then spin for milliseconds on the cores of the
    engine.
    """
    if load.device.type == "cpu":
        return torch.from_numpy(load.numpy().sum(-1))
    return load.sum(-1)


def fold_steps(load: torch.Tensor, snapshots: int) -> torch.Tensor:
    """Sum runs of neighbouring steps into snapshots, as the load window does step by step.

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


def to_exact(weight: torch.Tensor) -> torch.Tensor:
    """Scale each row to whole numbers whose sums are exact, on every device.

    The rounding of a floating-point sum depends on its order, and the order on device, batch and threads.
    Sums of whole numbers below 2^53 need no rounding: all that is computed from them is equal on every rank.

    Args:
        weight: float64 [snapshots, X, n], finite and not negative.

    Returns:
        float64 [snapshots, X, n]: whole numbers, each row `weight` times its own power of two, rounded. The
        sum of a row over snapshots and items is below 2^50.
    """
    snapshots, _, num_items = weight.shape
    largest = weight.amax(dim=(0, 2), keepdim=True)
    terms_bits = (snapshots * num_items).bit_length()
    exponent = (_TOTAL_BITS - terms_bits - torch.frexp(largest).exponent).to(torch.float64)
    # The power itself may lie outside of float64: it is applied in two halves.
    half = torch.floor(exponent / 2)
    return torch.round(weight * torch.exp2(half) * torch.exp2(exponent - half))


def _check_values(snapshots: torch.Tensor, name: str) -> None:
    values = snapshots.numpy() if snapshots.device.type == "cpu" else snapshots
    least, most = float(values.min()), float(values.max())
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


def _in_float64(load: torch.Tensor) -> torch.Tensor:
    """A contiguous copy: the order of a sum follows strides. Numpy lacks bfloat16; torch converts it."""
    if load.device.type == "cpu" and load.dtype in _OF_NUMPY:
        return torch.from_numpy(load.numpy().astype(np.float64, order="C"))
    return load.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
