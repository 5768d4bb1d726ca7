"""The policy `ensemble` and its packer: many packings of each row at once, the best refined by 2-opt.

After the packer that ADRS/OpenEvolve evolved for EPLB: noisy candidates, chunked greedy packing, vectorized
2-opt. All loads are whole numbers and the noise is a hash, so that every device finds the same packing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config.options import EnsembleOptions, PlannerOptions
from ..core.errors import LoadError, TopologyError
from ..core.load import as_snapshots, to_exact
from ..core.placement import Placement
from ..core.splitmix import GOLDEN_GAMMA, splitmix64, uniform
from ..core.topology import Topology
from .anti_affinity import set_replicas_apart
from .greedy import lpt_packing
from .pipeline import place_from_scratch

__all__ = ["Ensemble", "balanced_packing", "pack_items"]

_WIDEST_NOISE = 2.0  # the last candidate multiplies weights by factors from 0 to 2
_FINALISTS = 16  # candidates of each row that are refined
_ROUNDS = 20  # of 2-opt
_MOST_REPEATS = 7  # that are told apart: with loads below 2^50, the sum stays exact


def balanced_packing(
    weight: torch.Tensor, num_packs: int, options: EnsembleOptions | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack the n weighted items of every row into `num_packs` packs of exactly n / num_packs items.

    It minimises the load of the heaviest pack, or heaviest minus lightest (`options.objective`). No row is
    worse than with longest-processing-time packing. The result of a row depends on its weights and the
    options alone: not on the device, the other rows, or any global random state.

    Args:
        weight: [X, n], integer or float, on any device.
        num_packs: packs of each row; divides n.
        options: candidates, objective, seed and memory bound.

    Returns:
        pack_index: int64 [X, n], the pack of each item, on the device of `weight`.
        rank_in_pack: int64 [X, n], its place among the items of that pack.

    Raises:
        LoadError: NaN, infinite or negative weights, or a wrong shape.
        TopologyError: `num_packs` is not an integer from 1 on that divides n.
    """
    if isinstance(weight, torch.Tensor) and weight.dim() == 3:
        raise LoadError(f"weight has shape {tuple(weight.shape)}, not [X, n]; sum its snapshots first")
    weight = as_snapshots(weight, "weight")[0]
    num_items = weight.shape[1]
    if isinstance(num_packs, bool) or not isinstance(num_packs, int) or num_packs < 1:
        raise TopologyError(f"num_packs={num_packs!r} is not an integer from 1 on")
    if num_items % num_packs:
        raise TopologyError(f"{num_items} items are not divisible by num_packs={num_packs}")
    item = torch.arange(num_items, device=weight.device).expand_as(weight)
    return pack_items(weight, num_packs, item, options or EnsembleOptions())


def pack_items(
    weight: torch.Tensor, num_packs: int, expert: torch.Tensor, options: EnsembleOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """`balanced_packing` of checked weights, float64 [X, n], whose items may be replicas of the same expert.

    `expert`, int64 [X, n], says whose. Fewer pairs of one expert in a pack come before a lower objective.
    """
    capacity = weight.shape[1] // num_packs
    # Values alive at once for each item of a row: of its candidates, and of the exchanges of its finalists.
    values = max(10 * options.num_candidates, _FINALISTS * (2 * capacity + 10))
    height = max(1, options.memory_mib * 2**20 // (8 * weight.shape[1] * values))
    weights, experts = (torch.split(rows, height) for rows in (to_exact(weight[None])[0], expert))
    parts = [_best_packing(*both, num_packs, options) for both in zip(weights, experts, strict=True)]
    place = torch.cat(parts).argsort(dim=1)
    return place // capacity, place % capacity


def _best_packing(
    weight: torch.Tensor, expert: torch.Tensor, num_packs: int, options: EnsembleOptions
) -> torch.Tensor:
    """int64 [X, n], the item in each place, pack by pack; of float64 [X, n] whole numbers."""
    num_items = weight.shape[1]
    if num_packs in (1, num_items):
        return torch.arange(num_items, device=weight.device).expand(len(weight), -1)
    pack, place = lpt_packing(weight, (num_items // num_packs,) * num_packs)
    plain = (pack * (num_items // num_packs) + place).argsort(dim=1)
    orders = _noisy_orders(weight, options.num_candidates - 1, options.seed)
    items = torch.cat([plain[:, None], _pack_in_chunks(weight, orders, num_packs)], dim=1)
    values = _values(weight, expert, items, num_packs, options.objective)
    items = _select(items, values.argsort(dim=1, stable=True)[:, :_FINALISTS])
    items = _two_opt(weight, expert, items, num_packs)
    values = _values(weight, expert, items, num_packs, options.objective)
    return _select(items, values.argmin(dim=1, keepdim=True))[:, 0]


def _noisy_orders(weight: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """The order of falling weight, after multiplication by noise: int64 [X, count, n], item ids.

    The first order has no noise, each further one more. Equal weights get equal noise: replicas of an expert
    then follow each other, and rarely meet in a pack.
    """
    number = torch.arange(count, device=weight.device)
    mixed = splitmix64(splitmix64(weight.to(torch.int64)) + seed)
    noise = uniform(splitmix64(mixed[:, None] + number[:, None] * GOLDEN_GAMMA))
    width = number[:, None] * (_WIDEST_NOISE / max(1, count - 1))
    key = weight[:, None] * ((noise - 0.5) * width + 1.0)
    return key.sort(dim=2, descending=True, stable=True).indices


def _pack_in_chunks(weight: torch.Tensor, orders: torch.Tensor, num_packs: int) -> torch.Tensor:
    """Take `num_packs` items at a time, one for each pack, the first to the lightest: int64 [X, count, n],
    the item in each place."""
    weights = weight[:, None].expand_as(orders).gather(2, orders)
    load = weights.new_zeros(*orders.shape[:2], num_packs)
    placed = []
    for chunk, of_chunk in zip(*(torch.split(x, num_packs, dim=2) for x in (orders, weights)), strict=True):
        lightest_first = load.argsort(dim=2, stable=True)
        placed.append(torch.empty_like(chunk).scatter_(2, lightest_first, chunk))
        load.scatter_add_(2, lightest_first, of_chunk)
    return torch.stack(placed, dim=3).flatten(2)


def _two_opt(weight: torch.Tensor, expert: torch.Tensor, items: torch.Tensor, num_packs: int) -> torch.Tensor:
    """Rounds of exchanges between pairs of packs, in all packings [X, count, n] at once.

    A round pairs all packs, as a round-robin tournament does, the heaviest with the lightest first. Each pair
    makes the exchange of two items that brings its loads closest together. That never raises the heaviest
    pack and never lowers the lightest. No exchange brings an expert into a pack that holds it.
    """
    half = num_packs // 2
    capacity = items.shape[2] // num_packs
    for number in range(_ROUNDS):
        weights = _by_pack(weight, items, num_packs)
        load = weights.sum(3)
        falling = load.argsort(dim=2, descending=True, stable=True)
        table = torch.cat([falling[:, :, :1], falling[:, :, 1:].roll(number, dims=2)], dim=2)
        first, second = table[:, :, :half], table.flip(2)[:, :, :half]

        gap = load.gather(2, first) - load.gather(2, second)
        mine, theirs = _select(weights, first)[..., :, None], _select(weights, second)[..., None, :]
        gap_after = (gap[..., None, None] - 2 * (mine - theirs)).abs_()
        experts = _by_pack(expert, items, num_packs)
        same = _select(experts, first)[..., :, None] == _select(experts, second)[..., None, :]
        gap_after.masked_fill_(same.any(4, keepdim=True) | same.any(3, keepdim=True), torch.inf)
        least, best = gap_after.flatten(3).min(dim=3)
        place = first * capacity + best // capacity
        other = torch.where(least < gap.abs(), second * capacity + best % capacity, place)
        exchanged = items.gather(2, torch.cat([other, place], dim=2))
        items = items.scatter(2, torch.cat([place, other], dim=2), exchanged)
    return items


def _values(
    weight: torch.Tensor, expert: torch.Tensor, items: torch.Tensor, num_packs: int, objective: str
) -> torch.Tensor:
    """The objective of each packing [X, count, n], lower is better; repeats first: float64 [X, count]."""
    load = _by_pack(weight, items, num_packs).sum(3)
    value = load.amax(2) - load.amin(2) if objective == "spread" else load.amax(2)
    experts = _by_pack(expert, items, num_packs).sort(dim=3).values
    repeats = (experts[..., 1:] == experts[..., :-1]).sum((2, 3))
    return value.add(repeats.clamp(max=_MOST_REPEATS), alpha=2.0**50)


def _by_pack(values: torch.Tensor, items: torch.Tensor, num_packs: int) -> torch.Tensor:
    """Of values [X, n], those in each place of packings [X, count, n]: [X, count, packs, capacity]."""
    return values[:, None].expand_as(items).gather(2, items).view(*items.shape[:2], num_packs, -1)


def _select(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`values[..., index, :]`: the rows `index` [..., k] of [..., m, n], as [..., k, n]."""
    return values.gather(-2, index[..., None].expand(*index.shape, values.shape[-1]))


@dataclass(frozen=True)
class Ensemble:
    """Plans from the summed load, on its device, whatever is in force. It needs equal slots on every rank."""

    options: PlannerOptions

    def __call__(self, window: torch.Tensor, topology: Topology, current: Placement | None) -> Placement:
        if not topology.is_even:
            raise TopologyError(
                f"policy='ensemble' plans ranks with equal slots only, not {topology.rank_slots}; "
                "'adaptive' plans any"
            )
        # Whole numbers: the sums of a group are then the same on every device.
        load = to_exact(window).sum(0)
        ids = place_from_scratch(
            load,
            topology,
            lambda weight, sizes, expert: pack_items(weight, len(sizes), expert, self.options.ensemble),
            max_replicas=topology.ranks_per_node,
        )
        ids = set_replicas_apart(ids.cpu(), load[None].cpu(), topology)
        return Placement(ids.to(window.device), window.shape[2])
