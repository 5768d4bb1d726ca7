"""The share that each slot gets of its expert's tokens, under the dispatches of engines."""

from __future__ import annotations

import torch

from ..core.errors import PlacementError
from ..core.placement import Placement
from ..core.topology import Topology
from .balance_batch import balance_batch

__all__ = [
    "VLLM_HASH",
    "balanced_shares",
    "even_shares",
    "indexed_shares",
    "nearest_shares",
    "replica_numbers",
]

VLLM_HASH = 2654435769
"""Multiplier of vLLM's hash of a token's index. The replica is index * 2654435769 mod 2^32 mod replicas."""

_MOST_INDICES = 2**15  # of a batch: beyond them, the shares are even to four digits


def even_shares(placement: Placement) -> torch.Tensor:
    """1 / replicas: float64 [layers, slots]; 0 for an empty slot."""
    ids = placement.physical_to_logical
    count = placement.replica_count.gather(1, ids.clamp(min=0))
    return torch.where(ids < 0, 0.0, 1.0 / count.double())


def replica_numbers(placement: Placement) -> torch.Tensor:
    """int64 [layers, slots]: the number of each slot among those of its expert, in rising order."""
    ids, slots = placement.physical_to_logical, placement.logical_to_physical
    # The padding goes to a column behind the slots.
    number = ids.new_zeros(ids.shape[0], ids.shape[1] + 1)
    place = torch.arange(slots.shape[2], device=ids.device).expand_as(slots).flatten(1)
    number.scatter_(1, torch.where(slots < 0, ids.shape[1], slots).flatten(1), place)
    return number[:, :-1]


def indexed_shares(placement: Placement, batches: torch.Tensor, multiplier: int = 1) -> torch.Tensor:
    """Shares where the index of a token in its batch chooses the replica, as in vLLM and in SGLang.

    The replica is (index * multiplier mod 2^32) mod replicas. An expert's tokens are taken to be anywhere in
    the batch. Example: `VLLM_HASH`, 8 tokens and 3 replicas: 4/8, 1/8 and 3/8.

    Args:
        placement: replicas are numbered by their slots.
        batches: int64 [batches], tokens of each batch seen; those without tokens do not count.

    Returns:
        float64 [layers, slots].
    """
    batches = batches[batches > 0].clamp(max=_MOST_INDICES).cpu()
    if not len(batches):
        return even_shares(placement)
    index = torch.arange(int(batches.max()))
    # How many batches have a token of that index.
    seen = (len(batches) - torch.bucketize(index, batches.sort().values, right=True)).double()
    hashed = index * multiplier & 0xFFFFFFFF
    counts = placement.replica_count.cpu()
    table = torch.zeros(int(counts.max()) + 1, int(counts.max()), dtype=torch.float64)
    for replicas in sorted(set(counts.flatten().tolist())):
        part = torch.bincount(hashed % replicas, seen, minlength=table.shape[1])
        table[replicas] = part / seen.sum()
    ids = placement.physical_to_logical.cpu()
    shares = table[counts.gather(1, ids.clamp(min=0)), replica_numbers(placement).cpu()]
    return torch.where(ids < 0, 0.0, shares).to(placement.device)


def nearest_shares(placement: Placement, topology: Topology) -> torch.Tensor:
    """Shares where each rank sends all tokens of an expert to its nearest replica: SGLang's `static`.

    It takes the first replica on the own rank, else the first one on the own node, where not all are there.
    Ranks without either spread evenly over all replicas: SGLang draws them at random, equally often.

    Args:
        placement: without empty slots.

    Returns:
        float64 [layers, slots]. With rounding, SGLang's own differ by less than one rank's part.

    Raises:
        PlacementError: an empty slot, or other slots than the topology's.
    """
    placement.validate(topology)
    if placement.has_empty_slots:
        raise PlacementError(f"{placement} has empty slots: no rank can send its tokens there")
    table, count = placement.logical_to_physical, placement.replica_count
    rank_of = topology.rank_of_slot(placement.device)
    per_node = topology.num_ranks // topology.num_nodes
    valid = table >= 0
    home = torch.where(valid, rank_of[table.clamp(min=0)], -topology.num_ranks)
    served = torch.zeros(table.shape, dtype=torch.float64, device=table.device)
    for rank in range(topology.num_ranks):
        same_rank = home == rank
        same_node = valid & (home // per_node == rank // per_node)
        narrows = same_node.any(2) & (same_node.sum(2) < count)
        chosen = valid.double() / count.unsqueeze(2)
        for near, applies in ((same_node, narrows), (same_rank, same_rank.any(2))):
            first = near & (near.cumsum(2) == 1)
            chosen = torch.where(applies.unsqueeze(2), first.double(), chosen)
        served += chosen
    shares = torch.zeros(len(table), placement.num_slots + 1, dtype=torch.float64, device=table.device)
    place = torch.where(valid, table, placement.num_slots).flatten(1)
    shares.scatter_(1, place, served.flatten(1) / topology.num_ranks)
    return shares[:, :-1].contiguous()


def balanced_shares(
    counts: torch.Tensor, placement: Placement, topology: Topology, expert_cost: int
) -> torch.Tensor:
    """Shares of all tokens of some batches under dispatch `balanced`; even for an expert without tokens.

    Args:
        counts: integer [steps, layers, logical], tokens of whole batches.

    Returns:
        float64 [layers, slots].

    Raises:
        As `balance_batch`.
    """
    tokens = balance_batch(counts, placement, topology, expert_cost=expert_cost).sum(0).double()
    held = placement.physical_to_logical.clamp(min=0)
    of_expert = counts.sum(0, dtype=torch.int64).gather(1, held).double()
    return torch.where(of_expert > 0, tokens / of_expert.clamp(min=1), even_shares(placement))
