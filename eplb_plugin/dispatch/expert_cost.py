"""The least cost of a replica in use: the time to read an expert's weights, in tokens.

    (bytes / bandwidth) / (2 * parameters / compute)

A token takes two operations for each parameter. Kernels reach neither peak: `COMPUTE` and `BANDWIDTH` are the
fractions assumed. Both are from the README of DeepGEMM of March 2025, measured on an H800. Its grouped GEMMs
with 256 tokens an expert reach 815 to 932 of 1,979 TFLOPS, 41 to 47 %. With 64 tokens, its GEMMs read up to
2,668 of 3,350 GB/s, 80 %. Below 256 tokens an expert, which is where the cost counts, compute is lower still.

Example: an expert of gpt-oss-20b has 24.9 million parameters in 13.2 MB. An H100 reads them in 4.9
microseconds, and takes 0.126 for a token in 16 bits: 39 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..core.errors import ConfigError
from .accelerators import ACCELERATORS, Accelerator, find_accelerator

__all__ = [
    "BANDWIDTH",
    "COMPUTE",
    "cost_in_tokens",
    "resolve_expert_cost",
    "token_seconds",
    "weight_bits",
]

COMPUTE = 0.4
"""Fraction of the peak compute that grouped GEMMs reach."""

BANDWIDTH = 0.8
"""Fraction of the peak memory bandwidth at which they read weights."""

_WEIGHT = 0.25  # a tensor with fewer bytes, of those of the largest one, is a scale, a bias or a zero point
# Bits of a weight, and weights in each element.
_FORMATS = {
    torch.float32: (32, 1),
    torch.bfloat16: (16, 1),
    torch.float16: (16, 1),
    torch.int8: (8, 1),
    torch.uint8: (4, 2),
    torch.int32: (4, 8),
}


def resolve_expert_cost(option: int | str, tensors: Sequence[torch.Tensor], device: torch.device) -> int:
    """The option `expert_cost` in tokens.

    Bytes are counted in all tensors, parameters in the weights alone. Scales, biases and zero points are left
    out: tensors with less than a quarter of the bytes of the largest one. Packed formats: uint8
    holds two 4-bit weights (MXFP4, NVFP4), int32 eight of them (GPTQ, AWQ, compressed tensors). Any float8 is
    8 bits wide.

    Args:
        option: tokens, or `auto`.
        tensors: the weights of one layer, each [slots on this rank, ...].
        device: the accelerator.

    Raises:
        ConfigError: `auto`, and there are no weights, the accelerator is unknown, or so is a dtype.
    """
    if isinstance(option, int):
        return option
    if option != "auto":
        raise ConfigError(f"expert_cost={option!r} is neither a number of tokens nor 'auto'")
    advice = "give expert_cost as a number of tokens"
    if device.type != "cuda":
        known = ", ".join(ACCELERATORS)
        raise ConfigError(f"expert_cost='auto' knows {known}, not {device.type}; {advice}")
    try:
        accelerator = find_accelerator(torch.cuda.get_device_name(device))
    except ConfigError as error:
        raise ConfigError(f"expert_cost='auto': {error}; {advice}") from None
    used = [tensor for tensor in tensors if tensor.dim() and tensor.numel()]
    if not used:
        raise ConfigError(
            f"expert_cost='auto' needs the weights of a layer, and none are registered; {advice}"
        )
    sizes = [tensor.numel() * tensor.element_size() / tensor.shape[0] for tensor in used]
    parameters: dict[int, float] = {}
    for tensor, size in zip(used, sizes, strict=True):
        if size >= _WEIGHT * max(sizes):
            bits, packed = _format(tensor.dtype, advice)
            held = packed * tensor.numel() / tensor.shape[0]
            parameters[bits] = parameters.get(bits, 0.0) + held
    return cost_in_tokens(accelerator, sum(sizes), parameters)


def cost_in_tokens(accelerator: Accelerator, num_bytes: float, parameters: Mapping[int, float]) -> int:
    """The time to read an expert over the time of a token, rounded; at least 1.

    Args:
        accelerator: its peak rates.
        num_bytes: bytes of an expert, with its scales.
        parameters: its parameters, by the bits of a weight: 4, 8, 16 or 32.
    """
    read = num_bytes / (BANDWIDTH * 1e12 * accelerator.bandwidth)
    return max(1, round(read / token_seconds(accelerator, parameters)))


def token_seconds(accelerator: Accelerator, parameters: Mapping[int, float]) -> float:
    """The time of one token in one expert, in seconds. Arguments as for `cost_in_tokens`."""
    return sum(2 * held / (COMPUTE * 1e12 * accelerator.tflops(bits)) for bits, held in parameters.items())


def weight_bits(bits_per_weight: float) -> int:
    """The width of a weight, 4, 8, 16 or 32, from the mean bits with its share of the scales.

    Examples: 4.25 is 4 (MXFP4), 8.002 is 8.
    """
    return next((bits for bits in (4, 8, 16) if bits_per_weight < 1.5 * bits), 32)


def _format(dtype: torch.dtype, advice: str) -> tuple[int, int]:
    """Bits of a weight, and weights in each element."""
    if dtype in _FORMATS:
        return _FORMATS[dtype]
    name = str(dtype).removeprefix("torch.")
    if name.startswith("float8"):
        return 8, 1
    if name == "float4_e2m1fn_x2":  # newer versions of torch have it
        return 4, 2
    raise ConfigError(f"expert_cost='auto' does not know weights of {dtype}; {advice}")
