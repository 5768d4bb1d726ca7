"""Ranks compare what they were started with, and each plan before anyone acts on it.

Engines broadcast neither. Where ranks differ, collectives do not match and the engine hangs without an error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from ...core.errors import AgreementError
from ...runtime.control.rank_group import RankGroup, content_hash

__all__ = ["agree_on_plan", "announce"]

_LIMIT = timedelta(seconds=120)  # ranks that load a model arrive within seconds
_numbers = itertools.count()  # every rank announces equally often


def agree_on_plan(physical_to_logical: torch.Tensor, ranks: RankGroup) -> None:
    """Compare the hash of a plan: one all-gather of 8 bytes. All ranks call it together.

    Args:
        physical_to_logical: int64 [layers, slots], this rank's plan.
        ranks: the ranks that have to hold the same plan.

    Raises:
        AgreementError: on all ranks; names the ranks of each plan.
        RankLostError: another rank did not answer.
    """
    mine = torch.tensor([content_hash(physical_to_logical.cpu())], device=ranks.device)
    hashes = ranks.all_gather(mine).flatten().tolist()
    if len(set(hashes)) > 1:
        # Without the hashes, so that the message is the same each time and is logged once.
        held = [[r for r, other in enumerate(hashes) if other == plan] for plan in dict.fromkeys(hashes)]
        described = ", another on ranks ".join(map(str, held))
        raise AgreementError(f"ranks planned different maps: one on ranks {described}")


def announce(start: str) -> Callable[[Sequence[int]], None]:
    """Leave in the store of the default group what this rank was started with. Waits for nobody.

    Args:
        start: options and whatever else has to be equal, as text; empty where the plugin is not enabled.

    Returns:
        A function for ranks with the plugin enabled: it compares `start` with the texts of the given ranks of
        the default group. It raises AgreementError for another text, for a rank without the plugin enabled,
        and for a rank that has said nothing after two minutes.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return lambda ranks: None
    store, mine = dist.distributed_c10d._get_default_store(), dist.get_rank()
    prefix = f"eplb_plugin/start/{next(_numbers)}"
    store.set(f"{prefix}/{mine}", start)

    def compare(ranks: Sequence[int]) -> None:
        if max(ranks) >= dist.get_world_size():
            return  # a group for elastic scaling has ranks beyond the default group
        try:
            store.wait([f"{prefix}/{rank}" for rank in ranks], _LIMIT)
        except RuntimeError:
            silent = [rank for rank in ranks if not store.check([f"{prefix}/{rank}"])]
            raise AgreementError(
                f"eplb_plugin is enabled on rank {mine}, but ranks {silent} have not said within "
                f"{_LIMIT.total_seconds():g} s whether it is enabled there: it has to be installed on every "
                "node, and to be in the engine's list of allowed plugins where there is one"
            ) from None
        said = {rank: store.get(f"{prefix}/{rank}").decode() for rank in ranks}
        if disabled := [rank for rank, text in said.items() if not text]:
            raise AgreementError(
                f"eplb_plugin is enabled on rank {mine}, but not on ranks {disabled}: every process needs "
                "the same arguments, or the same file in EPLB_PLUGIN_CONFIG"
            )
        if others := [rank for rank, text in said.items() if text != start]:
            raise AgreementError(
                f"eplb_plugin has other options on ranks {others} than on rank {mine}: {said[others[0]]} on "
                f"rank {others[0]}, here {start}"
            )

    return compare
