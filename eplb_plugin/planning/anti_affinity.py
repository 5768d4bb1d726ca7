"""Anti-affinity: replicas of one expert on distinct ranks, where that hardly raises the peak rank load.

Placements are int64 [layers, slots] on the CPU, loads float64 [snapshots, layers, logical], topologies as
from `effective_topology`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ..core.load import to_exact
from ..core.topology import Topology
from .kernels.api import count_shared, keep_slots
from .replica_counts import count_replicas

__all__ = ["exchange_repeats", "replace_repeats", "set_replicas_apart", "shared_replicas"]

_PEAK_ALLOWANCE = 0.01  # an exchange may raise the peak by this share
_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]


def shared_replicas(physical_to_logical: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Slots whose expert sits in a lower slot of the same rank too: bool [layers, slots]."""
    by_expert, order = topology.by_rank(physical_to_logical, -1).sort(dim=2, stable=True)
    repeated = torch.zeros_like(by_expert, dtype=torch.bool)
    repeated[:, :, 1:] = by_expert[:, :, 1:] == by_expert[:, :, :-1]
    return topology.from_ranks(torch.empty_like(repeated).scatter_(2, order, repeated))


def set_replicas_apart(
    physical_to_logical: torch.Tensor,
    load: torch.Tensor,
    topology: Topology,
    current: torch.Tensor | None = None,
    max_moves: int | None = None,
) -> torch.Tensor:
    """Set replicas that share a rank apart, where that is cheap and within the bound of moves.

    First by exchanges (`exchange_repeats`), then by other replica counts (`replace_repeats`).

    Args:
        current: the placement that moves are counted from, -1 for an empty slot; None without one.
        max_moves: bound on the moves of a layer. A layer stays as it is where it would exceed both the bound
            and its own moves; None is no bound.
    """
    num_logical = load.shape[2]
    layers = count_shared(physical_to_logical, topology, num_logical).nonzero()[:, 0]
    if not layers.numel():
        return physical_to_logical
    some, exact = physical_to_logical[layers], to_exact(load[:, layers])
    apart = exchange_repeats(some, exact / count_replicas(some, num_logical), topology)
    apart = replace_repeats(apart, exact, topology)
    if current is not None and max_moves is not None:
        before, after = (keep_slots(x, current[layers], topology, num_logical)[1] for x in (some, apart))
        apart = torch.where((after <= before.clamp(min=max_moves))[:, None], apart, some)
    return physical_to_logical.index_copy(0, layers, apart)


def exchange_repeats(
    physical_to_logical: torch.Tensor, share: torch.Tensor, topology: Topology
) -> torch.Tensor:
    """Exchange slots between ranks of a node until no rank holds an expert twice, where that is cheap.

    One exchange for each layer and round, the one with the lowest peak rank load after it. No exchange may
    raise the peak of a layer by more than 1 % over its start: from 100 to at most 101 tokens. `share` is the
    load of one replica of each expert. `shared_replicas` names the repeats that are left.
    """
    result = physical_to_logical.clone()
    repeated = _exchangeable(result, topology, share.shape[2])
    layers = repeated.any(1).nonzero()[:, 0]
    limit = _rank_loads(result, share, topology).amax(2).sum(0) * (1 + _PEAK_ALLOWANCE)
    given_up = torch.zeros_like(repeated)
    while layers.numel():
        ids, pending = result[layers], (repeated & ~given_up)[layers]
        slot = pending.to(torch.int8).argmax(dim=1)
        peak, partner = _best_exchange(ids, share[:, layers], slot, topology)
        allowed = peak <= limit[layers]
        given_up[layers, slot] = ~allowed
        row, mine, theirs = layers[allowed], slot[allowed], partner[allowed]
        result[row, mine], result[row, theirs] = result[row, theirs], result[row, mine]
        if row.numel():
            repeated = _exchangeable(result, topology, share.shape[2])
            # An exchange never adds repeats, and may make others possible.
            given_up[row] = False
        layers = (repeated & ~given_up).any(1).nonzero()[:, 0]
    return result


def replace_repeats(
    physical_to_logical: torch.Tensor, load: torch.Tensor, topology: Topology
) -> torch.Tensor:
    """Give slots that repeat an expert of their rank to other experts of the node, which the rank lacks.

    For replica counts that no exchange can spread over distinct ranks. As with exchanges, the peak rank load
    of a layer may rise by 1 %, and the expert with the lowest peak afterwards is taken.
    """
    num_logical = load.shape[2]
    result = physical_to_logical.clone()
    repeated = _movable(shared_replicas(result, topology), topology, num_logical)
    rank_of_slot = topology.rank_of_slot().numpy()
    node_of_slot = rank_of_slot // topology.ranks_per_node
    for layer in repeated.any(1).nonzero()[:, 0].tolist():
        row, weight = result[layer].numpy(), load[:, layer].numpy()
        # [ranks, logical]: how many slots of a rank hold an expert.
        held = np.zeros((topology.num_ranks, num_logical))
        np.add.at(held, (rank_of_slot, row), 1.0)
        share = load[:, layer : layer + 1] / torch.from_numpy(held.sum(0))
        loads = _rank_loads(result[layer : layer + 1], share, topology).numpy()[:, 0]
        limit = loads.max(1).sum() * (1 + _PEAK_ALLOWANCE)
        for slot in repeated[layer].nonzero()[:, 0].tolist():
            rank, old = rank_of_slot[slot], row[slot]
            of_node = np.unique(row[node_of_slot == node_of_slot[slot]])
            new = of_node[held[rank, of_node] == 0]
            if not new.size:
                continue
            after = _loads_after_replacing(loads, held, weight, rank, old, new)
            peak = after.max(2).sum(0)
            best = int(peak.argmin())
            if peak[best] <= limit:
                row[slot], loads = new[best], after[:, best]
                held[rank, old] -= 1
                held[rank, new[best]] += 1
    return result


def _loads_after_replacing(
    loads: _Floats, held: _Floats, weight: _Floats, rank: int, old: int, new: _Ints
) -> _Floats:
    """The rank loads after a replica of `old` on `rank` became a replica of each of `new` in turn: float64
    [snapshots, new, ranks]. `loads` is [snapshots, ranks], `weight` [snapshots, logical]. `held`,
    [ranks, logical], is how many slots of a rank hold an expert."""
    count = held.sum(0)
    staying, arriving = weight[:, old] / (count[old] - 1), weight[:, new] / (count[new] + 1)
    rest = loads + held[:, old] * (staying - weight[:, old] / count[old])[:, None]
    rest[:, rank] -= staying
    relief = weight[:, new] / count[new] - arriving
    after: _Floats = rest[:, None] - held[:, new].T * relief[:, :, None]
    after[:, :, rank] += arriving
    return after


def _movable(repeated: torch.Tensor, topology: Topology, num_logical: int) -> torch.Tensor:
    """The slots in `repeated`, bool [layers, slots], whose rank lacks an expert of its node."""
    held = topology.by_rank(~repeated, False).sum(2)
    lacks = held < num_logical // topology.num_nodes
    return repeated & lacks[:, topology.rank_of_slot(repeated.device)]


def _exchangeable(ids: torch.Tensor, topology: Topology, num_logical: int) -> torch.Tensor:
    """`shared_replicas` on a rank that lacks an expert of its node, of an expert that another rank lacks."""
    repeated = shared_replicas(ids, topology)
    node = topology.rank_of_slot(ids.device) // topology.ranks_per_node
    place = node * num_logical + ids
    holders = torch.zeros((len(ids), topology.num_nodes * num_logical), dtype=torch.int64, device=ids.device)
    holders.scatter_add_(1, place, (~repeated).long())
    lacked = holders.gather(1, place) < topology.ranks_per_node
    return _movable(repeated, topology, num_logical) & lacked


def _rank_loads(ids: torch.Tensor, share: torch.Tensor, topology: Topology) -> torch.Tensor:
    """float64 [snapshots, layers, ranks], of the load of one replica of each expert."""
    placed = share.gather(2, ids.expand(share.shape[0], -1, -1))
    return topology.by_rank(placed, 0.0).sum(3)


def _best_exchange(
    ids: torch.Tensor, share: torch.Tensor, slot: torch.Tensor, topology: Topology
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best partner of `slot` [layers] for an exchange: the peak after it (or infinity), and its slot.

    The partner lies on another rank of the node, which lacks the expert of `slot`. Its expert is one that the
    rank of `slot` lacks. So every exchange removes a repeat and adds none.
    """
    layers, num_slots = ids.shape
    row = torch.arange(layers, device=ids.device)
    rank_of_slot = topology.rank_of_slot(ids.device)
    rank = rank_of_slot[slot]
    expert = ids[row, slot]
    # Where a rank has no slot it holds one more expert, which nothing else holds.
    num_logical = share.shape[2]
    per_rank = topology.by_rank(ids, num_logical)
    lacks_mine = ~(per_rank == expert[:, None, None]).any(2)
    held_here = torch.zeros((layers, num_logical + 1), dtype=torch.bool, device=ids.device)
    held_here.scatter_(1, per_rank[row, rank], True)
    same_node = rank_of_slot // topology.ranks_per_node == (rank // topology.ranks_per_node)[:, None]
    possible = lacks_mine[:, rank_of_slot] & ~held_here.gather(1, ids) & same_node

    load = _rank_loads(ids, share, topology)
    peak = torch.zeros((layers, num_slots), dtype=share.dtype, device=ids.device)
    for snapshot in range(share.shape[0]):
        loads = load[snapshot]
        shift = share[snapshot][row, expert][:, None] - share[snapshot].gather(1, ids)
        rest = _peak_without(loads, rank)[:, rank_of_slot]
        pair = torch.maximum(loads[row, rank][:, None] - shift, loads[:, rank_of_slot] + shift)
        peak += torch.maximum(rest, pair)
    peak = torch.where(possible, peak, torch.inf)
    best = peak.argmin(dim=1)
    return peak[row, best], best


def _peak_without(loads: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """Largest load among the ranks other than `rank` [layers] and each rank in turn: [layers, ranks]."""
    rest = loads.scatter(1, rank[:, None], -torch.inf)
    first = rest.argmax(dim=1, keepdim=True)
    without_first = rest.scatter(1, first, -torch.inf).amax(1, keepdim=True)
    return rest.amax(1, keepdim=True).expand_as(rest).scatter(1, first, without_first)
