"""Ranks tell each other at the start whether the plugin is enabled on them, and with which options.

Where they differ, collectives would not match at the first rearrangement, long after a start that looked
fine. vLLM's own comparison of configurations leaves `additional_config` out, and files and variables may
differ between nodes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch.distributed as dist

from ...core.errors import AgreementError

__all__ = ["announce"]

_LIMIT = timedelta(seconds=120)  # ranks that load a model arrive within seconds
_numbers = itertools.count()  # every rank makes as many states


def announce(options: str) -> Callable[[Sequence[int]], None]:
    """Leave in the store of the default group what this rank was started with. Waits for nobody.

    Args:
        options: of an enabled plugin, as text; empty where it is not enabled.

    Returns:
        A function that compares this with what the given ranks of the default group have left, for ranks on
        which the plugin is enabled. It raises AgreementError where one differs, has not enabled the plugin,
        or has said nothing within two minutes.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return lambda ranks: None
    store, mine = dist.distributed_c10d._get_default_store(), dist.get_rank()
    prefix = f"eplb_plugin/start/{next(_numbers)}"
    store.set(f"{prefix}/{mine}", options)

    def compare(ranks: Sequence[int]) -> None:
        if max(ranks) >= dist.get_world_size():
            return  # a group for elastic scaling has ranks beyond the default group
        keys = {rank: f"{prefix}/{rank}" for rank in ranks}
        try:
            store.wait(list(keys.values()), _LIMIT)
        except RuntimeError:
            silent = [rank for rank, key in keys.items() if not store.check([key])]
            raise AgreementError(
                f"eplb_plugin is enabled on rank {mine}, but ranks {silent} have not said within "
                f"{_LIMIT.total_seconds():g} s whether it is on them: it has to be installed on every node, "
                "and to be in VLLM_PLUGINS where that is set"
            ) from None
        said = {rank: store.get(key).decode() for rank, key in keys.items()}
        disabled = [rank for rank, text in said.items() if not text]
        if disabled:
            raise AgreementError(
                f"eplb_plugin is enabled on rank {mine}, but not on ranks {disabled}: every process needs "
                "the same --additional-config, or the same file in EPLB_PLUGIN_CONFIG"
            )
        others = {rank: text for rank, text in said.items() if text != options}
        if others:
            rank, text = next(iter(others.items()))
            raise AgreementError(
                f"eplb_plugin has other options on ranks {list(others)} than on rank {mine}: {text} on rank "
                f"{rank}, here {options}"
            )

    return compare
