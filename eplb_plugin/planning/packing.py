"""The ensemble packer on tensors: many candidate packings of every row at once, refined, the best kept.

Candidates, chunked greedy packing and 2-opt refinement follow the vectorized ensemble that ADRS/OpenEvolve
evolved for EPLB; here swaps reach every pack, the noise is the row's own, and all arithmetic is exact.
"""

from __future__ import annotations

import torch

from ..config import PlannerOptions
from ..load import as_snapshots
from .backend import use_kernels
from .candidates import FIXED_ORDERS, OrderEnsemble
from .compiled import pack_rows
from .exact import to_exact
from .greedy import items_per_pack, lpt_packing
from .refinement import objective_value, refine

__all__ = ["balanced_packing", "pack_exact", "pack_lower_bound"]

_COMPILED_ROUNDS = 10  # compiled rounds for each of the tensor version, which refine many candidates at once
_COPIES = 12  # temporaries of the refinement's swap matrix that can be alive at once


def balanced_packing(
    weight: torch.Tensor, num_packs: int, options: PlannerOptions | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack n weighted items of every row into `num_packs` packs of exactly n / num_packs items.

    Minimises the load of the heaviest pack (or heaviest minus lightest, `options.objective`); of several
    snapshots, its mean over the snapshots. Never worse than longest-processing-time packing on any row. A
    row gives the same result in every batch. The peak of a load on the CPU is minimised by the compiled
    search, everything else by the tensor version; each gives the same result on every machine.

    Args:
        weight: [X, n] or [snapshots, X, n], integer or float, any device.
        num_packs: packs per row; divides n.
        options: candidates, rounds, objective, tolerance, memory bound and seed.

    Returns:
        pack_index: int64 [X, n], the pack of each item.
        rank_in_pack: int64 [X, n], its place among the items of that pack.

    Raises:
        LoadError: NaN, infinite or negative weights, or a wrong shape.
        TopologyError: n is not divisible by num_packs.
    """
    snapshots = as_snapshots(weight, "weight")
    items_per_pack(snapshots.shape[2], num_packs)
    options = options or PlannerOptions()
    if use_kernels(snapshots, options):
        return pack_rows(
            snapshots,
            num_packs,
            rounds=_COMPILED_ROUNDS * options.refine_rounds,
            candidates=options.num_candidates,
            patience=options.num_candidates,
            tolerance=options.tolerance,
            seed=options.seed,
        )
    return pack_exact(to_exact(snapshots), num_packs, options)


def pack_lower_bound(exact: torch.Tensor, num_packs: int) -> torch.Tensor:
    """No packing has a smaller sum over snapshots of the peak: float64 [X] of [snapshots, X, n].

    In each snapshot the peak is at least the mean pack load, and at least the heaviest item together with
    the lightest items that can share its pack.
    """
    capacity = exact.shape[2] // num_packs
    rising = exact.sort(dim=2).values
    heaviest = rising[:, :, -1] + rising[:, :, : capacity - 1].sum(2)
    return torch.maximum(exact.sum(2) / num_packs, heaviest).sum(0)


def pack_exact(
    exact: torch.Tensor, num_packs: int, options: PlannerOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """`balanced_packing` of weights that are exact already: float64 [snapshots, X, n] from `to_exact`."""
    _, num_rows, num_items = exact.shape
    capacity = items_per_pack(num_items, num_packs)
    best = lpt_packing(exact.sum(0), num_packs)
    if num_packs == 1 or capacity == 1:
        return best

    best_items = _items_of(best, num_packs, capacity)
    best_value = _value(exact, best_items, options)
    bound = pack_lower_bound(exact, num_packs)
    ensemble = OrderEnsemble(exact, options.seed)
    rows = torch.arange(num_rows, device=exact.device)
    first = 0
    for last in _stages(options.num_candidates):
        rows = rows[~_finished(best_value[rows], bound[rows], options)]
        if rows.numel() == 0:
            break
        for part in _slices(rows, exact.shape[0], num_items, capacity, options, first, last):
            chosen, low, high = part
            items, value = _best_candidate(exact, ensemble, chosen, low, high, num_packs, options)
            better = value < best_value[chosen]
            best_value[chosen] = torch.where(better, value, best_value[chosen])
            best_items[chosen] = torch.where(better[:, None, None], items, best_items[chosen])
        first = last
    return _indices_of(best_items)


def _stages(num_candidates: int) -> list[int]:
    """Ends of the stages: the fixed orders first, since most rows are finished with them."""
    return sorted({min(FIXED_ORDERS, num_candidates), min(16, num_candidates), num_candidates})


def _slices(
    rows: torch.Tensor,
    num_snapshots: int,
    num_items: int,
    capacity: int,
    options: PlannerOptions,
    first: int,
    last: int,
) -> list[tuple[torch.Tensor, int, int]]:
    """Cut rows x candidates into (rows, first, last) so that each part keeps to the memory bound."""
    per_candidate = 8 * num_items * (_COPIES * capacity + 4 * num_snapshots + 8)
    fits = max(1, options.memory_mib * 2**20 // per_candidate)
    width = min(last - first, fits)
    height = max(1, fits // width)
    return [
        (rows[at : at + height], low, min(low + width, last))
        for at in range(0, rows.numel(), height)
        for low in range(first, last, width)
    ]


def _best_candidate(
    exact: torch.Tensor,
    ensemble: OrderEnsemble,
    rows: torch.Tensor,
    first: int,
    last: int,
    num_packs: int,
    options: PlannerOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack and refine candidates of `rows`: items [rows, packs, capacity] and value [rows] of the best."""
    order = ensemble.orders(rows, first, last)
    num_candidates = order.shape[1]
    weight = exact[:, rows].movedim(0, 1)
    weight = weight.repeat_interleave(num_candidates, dim=0)
    items = _chunked_greedy(weight.sum(1), order.flatten(0, 1), num_packs)
    items = refine(weight, items, options)
    value = objective_value(weight, items, options.objective).view(-1, num_candidates)
    best = value.argmin(dim=1)
    row = torch.arange(rows.numel(), device=rows.device)
    return items.view(-1, num_candidates, *items.shape[1:])[row, best], value[row, best]


def _chunked_greedy(total: torch.Tensor, order: torch.Tensor, num_packs: int) -> torch.Tensor:
    """Hand out items in chunks of `num_packs`, the first of a chunk to the lightest pack, one to each pack.

    Args:
        total: float64 [B, n], weight of each item over all snapshots.
        order: int64 [B, n], item ids in the order in which they are handed out.

    Returns:
        int64 [B, packs, capacity], item ids.
    """
    batch, num_items = order.shape
    capacity = num_items // num_packs
    load = torch.zeros((batch, num_packs), dtype=total.dtype, device=total.device)
    items = torch.empty((batch, num_packs, capacity), dtype=torch.int64, device=total.device)
    for chunk in range(capacity):
        handed_out = order[:, chunk * num_packs : (chunk + 1) * num_packs]
        lightest_first = load.sort(dim=1, stable=True).indices
        items[:, :, chunk].scatter_(1, lightest_first, handed_out)
        load += total.gather(1, items[:, :, chunk])
    return items


def _finished(value: torch.Tensor, bound: torch.Tensor, options: PlannerOptions) -> torch.Tensor:
    if options.objective == "peak":
        return value <= bound * (1 + options.tolerance)
    return value <= bound * options.tolerance


def _value(exact: torch.Tensor, items: torch.Tensor, options: PlannerOptions) -> torch.Tensor:
    return objective_value(exact.movedim(0, 1), items, options.objective)


def _items_of(packing: tuple[torch.Tensor, torch.Tensor], num_packs: int, capacity: int) -> torch.Tensor:
    """int64 [X, packs, capacity] item ids of (pack_index, rank_in_pack)."""
    place = packing[0] * capacity + packing[1]
    item = torch.arange(place.shape[1], device=place.device).expand_as(place)
    return torch.empty_like(place).scatter_(1, place, item).view(-1, num_packs, capacity)


def _indices_of(items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(pack_index, rank_in_pack) of item ids [X, packs, capacity]."""
    capacity = items.shape[2]
    flat = items.flatten(1)
    place = torch.arange(flat.shape[1], device=items.device).expand_as(flat)
    place = torch.empty_like(flat).scatter_(1, flat, place)
    return place // capacity, place % capacity
