"""The ensemble packer on tensors: many candidate packings of every row at once, the best refined.

Noisy candidates, chunked greedy packing and 2-opt refinement follow the vectorized ensemble that
ADRS/OpenEvolve evolved for EPLB; here all arithmetic is exact, the noise is the row's own, swaps part
replicas of one expert, and the amount of work is fixed, so that nothing waits for the device.
"""

from __future__ import annotations

import torch

from ...config.options import PlannerOptions
from ...core.load import check_values, to_snapshots, zero_if_bad
from ..backend import use_kernels
from ..exact import to_exact
from ..greedy import items_per_pack, lpt_packing
from ..kernels.api import pack_rows
from .candidates import candidate_packings
from .host_waits import look
from .packing_batch import Packings
from .parting import part_replicas
from .refinement import even_out, relieve

__all__ = ["balanced_packing", "best_packing"]

_COMPILED_ROUNDS = 10  # compiled rounds for each of the tensor version, which refine many candidates at once
_FINALISTS = 16  # candidates that are refined
_PARTING_ROUNDS = 2
_PAIRED_SHARE = 5  # of this many of `refine_rounds`, one round of pairs
_COPIES = 3  # temporaries of the refinement's swap matrix that can be alive at once


def balanced_packing(
    weight: torch.Tensor, num_packs: int, options: PlannerOptions | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack n weighted items of every row into `num_packs` packs of exactly n / num_packs items.

    Minimises the load of the heaviest pack (or heaviest minus lightest, `options.objective`); of several
    snapshots, its mean over the snapshots. The peak of a load on the CPU is minimised by the compiled
    search, everything else by the tensor version; each gives the same result on every machine, and for a row
    the same in every batch.

    No row is worse than with longest-processing-time packing: by the tensor version, and by the compiled
    search of one snapshot, but for rounding. Of several snapshots the compiled search lowers a smooth peak,
    and the peak may end up a little higher, up to 0.7 % in trials.

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
    options = options or PlannerOptions()
    snapshots = to_snapshots(weight, "weight")
    if use_kernels(snapshots, options):
        check_values(snapshots, name="weight")
        items_per_pack(snapshots.shape[2], num_packs)
        return pack_rows(
            snapshots,
            num_packs,
            rounds=_COMPILED_ROUNDS * options.refine_rounds,
            candidates=options.num_candidates,
            patience=options.num_candidates,
            tolerance=options.tolerance,
            seed=options.seed,
        )
    usable, least, most = zero_if_bad(snapshots)
    capacity = items_per_pack(snapshots.shape[2], num_packs)
    exact = to_exact(usable)
    plain = lpt_packing(exact.sum(0), num_packs)
    items, _ = best_packing(exact[:, :, None], None, num_packs, options)
    item = torch.arange(items.shape[1], device=items.device).expand_as(items)
    place = torch.empty_like(items).scatter_(1, items, item)
    ours = (place // capacity, place % capacity)
    theirs = torch.empty_like(items).scatter_(1, plain[0] * capacity + plain[1], item)
    better = _value(exact, items, num_packs, options) <= _value(exact, theirs, num_packs, options)
    least_seen, most_seen = look(torch.stack([least, most]))
    check_values(snapshots, least_seen, most_seen, "weight")
    chosen = torch.where(better[:, None], torch.stack(ours), torch.stack(plain))
    return chosen[0], chosen[1]


def best_packing(
    exact: torch.Tensor, experts: torch.Tensor | None, num_packs: int, options: PlannerOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best packing of each row found among those of its variants, of which one is wanted.

    Every variant gets its share of the candidates. The best of all of them, by repeats and then by the
    objective, are refined, whatever variant they are of.

    Args:
        exact: float64 [snapshots, X, variants, n] from `to_exact`, one scale for all variants of a row.
        experts: int64 [X, variants, n], ids below n: no pack should hold an expert twice; None where items
            are all different.
        num_packs: packs per row; divides n.
        options: candidates, rounds, objective, memory bound and seed.

    Returns:
        items: int64 [X, n], the item in each place, pack by pack; variant: int64 [X], whose items they are.
    """
    num_snapshots, num_rows, num_variants, num_items = exact.shape
    item = torch.arange(num_items, device=exact.device)
    if num_packs in (1, num_items):
        return item.expand(num_rows, -1), torch.zeros_like(item[:1]).expand(num_rows)
    if experts is None and num_snapshots == 1 and num_items == 2 * num_packs:
        return _best_pairs(exact[0, :, 0]), torch.zeros_like(item[:1]).expand(num_rows)
    all_experts = item.expand(num_rows, num_variants, -1) if experts is None else experts
    per_variant = -(-options.num_candidates // num_variants)
    capacity = num_items // num_packs
    # Places of the candidates of a row and of its finalists, with all that is known of each at a time.
    per_row = max(
        per_variant * num_variants * (num_snapshots + capacity // 4 + 9),
        _FINALISTS * (num_snapshots * (_COPIES * capacity + 4) + capacity + 9),
    )
    height = max(1, options.memory_mib * 2**20 // (8 * num_items * per_row))
    parts = []
    for at in range(0, num_rows, height):
        rows = slice(at, at + height)
        packings = candidate_packings(exact[:, rows], all_experts[rows], num_packs, per_variant, options.seed)
        parts.append(_best_of_each(packings, per_variant * num_variants, experts is not None, options))
    return torch.cat([items for items, _ in parts]), torch.cat([best for _, best in parts]) // per_variant


def _best_of_each(
    packings: Packings, per_row: int, has_replicas: bool, options: PlannerOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each `per_row` packings the best when some are refined: its items [X, n], and its number [X]."""
    rank = packings.rank(options.objective).view(-1, per_row)
    first = torch.arange(rank.shape[0], device=rank.device)[:, None]
    finalists = rank.sort(dim=1, stable=True).indices[:, :_FINALISTS]
    packings = packings.chosen((first * per_row + finalists).flatten())
    packings = _refined(packings, has_replicas, options)
    best = packings.rank(options.objective).view_as(finalists).argmin(dim=1, keepdim=True)
    rows = (first * finalists.shape[1] + best).flatten()
    return packings.items.index_select(0, rows), finalists.gather(1, best)[:, 0]


def _best_pairs(weight: torch.Tensor) -> torch.Tensor:
    """Two items to a pack: the heaviest with the lightest, the next with the next, and so on. No other pairs
    have a lower heaviest one or a heavier lightest one.

    Args:
        weight: float64 [X, n].

    Returns:
        int64 [X, n], the item in each place.
    """
    falling = weight.sort(dim=1, descending=True, stable=True).indices
    half = weight.shape[1] // 2
    return torch.stack([falling[:, :half], falling.flip(1)[:, :half]], dim=2).flatten(1)


def _refined(packings: Packings, has_replicas: bool, options: PlannerOptions) -> Packings:
    """Fixed numbers of rounds, fewer for small packings.

    Of a single snapshot a round of pairs evens out all packs at once, and little is left to do one by one.
    """
    num_snapshots, num_items = packings.weight.shape[1:]
    paired = min(-(-options.refine_rounds // _PAIRED_SHARE), -(-num_items // 8))
    single = max(paired, packings.num_packs // 4) if num_snapshots == 1 else num_items
    if has_replicas:
        packings = part_replicas(packings, _PARTING_ROUNDS, options.objective)
    packings = even_out(packings, paired, options.objective)
    return relieve(packings, min(single, options.refine_rounds), options.objective)


def _value(exact: torch.Tensor, items: torch.Tensor, num_packs: int, options: PlannerOptions) -> torch.Tensor:
    return Packings(exact.movedim(0, 1), items, items, num_packs).value(options.objective)
