"""The ensemble: many orders in which the items of a row can be handed out, and the packings they lead to."""

from __future__ import annotations

import torch

from ..exact import row_hash, uniform_noise
from .packing_batch import Packings, over_snapshots

__all__ = ["candidate_packings", "handing_orders"]

_WIDEST = 2.0  # width of the last candidate's noise: factors from 0 to 2


def candidate_packings(
    exact: torch.Tensor, experts: torch.Tensor, num_packs: int, per_variant: int, seed: int
) -> Packings:
    """One packing for each order, of every variant.

    Args:
        exact: float64 [snapshots, X, variants, n] from `to_exact`.
        experts: int64 [X, variants, n], the expert of each item.
        num_packs: packs of each packing.
        per_variant: orders of each variant.
        seed: seed of the noise.

    Returns:
        X * variants * per_variant packings, those of a row together.
    """
    orders = handing_orders(exact, experts, per_variant, seed).flatten(0, 2)
    snapshots, _, _, num_items = exact.shape
    each = exact.movedim(0, 2)[:, :, None].expand(-1, -1, per_variant, snapshots, num_items).flatten(0, 2)
    experts = experts[:, :, None].expand(-1, -1, per_variant, num_items).flatten(0, 2)
    return Packings(each, experts, _hand_out(over_snapshots(each), orders, num_packs), num_packs)


def handing_orders(exact: torch.Tensor, experts: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """The heaviest item first, after weights were multiplied with noise.

    The first order has none (longest processing time first), the others ever more. The noise is that of the
    expert, so that its replicas follow each other and rarely meet in a pack; it depends on nothing but the
    row, the seed, the expert and the number of the order.

    Args:
        exact: float64 [snapshots, X, variants, n].
        experts: int64 [X, variants, n].
        count: orders of each variant.
        seed: seed of the noise.

    Returns:
        int64 [X, variants, count, n], item ids.
    """
    num_items = exact.shape[3]
    number = torch.arange(count, device=exact.device)
    noise = uniform_noise(row_hash(exact.flatten(2)), seed, number, num_items)
    factor = (noise - 0.5) * (number * (_WIDEST / count))[:, None] + 1.0
    index = experts[:, :, None].expand(-1, -1, count, -1)
    factor = factor[:, None].expand(-1, experts.shape[1], -1, -1).gather(3, index)
    key = exact.sum(0)[:, :, None] * factor
    return key.sort(dim=3, descending=True, stable=True).indices


def _hand_out(total: torch.Tensor, order: torch.Tensor, num_packs: int) -> torch.Tensor:
    """Hand out items in chunks of `num_packs`, the first of a chunk to the lightest pack, one to each pack.

    Args:
        total: float64 [B, n], weight of each item over all snapshots.
        order: int64 [B, n], item ids in the order in which they are handed out.

    Returns:
        int64 [B, n], the item in each place.
    """
    chunks = order.view(order.shape[0], -1, num_packs)
    weights = total.gather(1, order).view_as(chunks)
    load, placed = weights[:, 0].clone(), [chunks[:, 0]]
    for chunk, weight in zip(chunks.unbind(1)[1:], weights.unbind(1)[1:], strict=True):
        lightest_first = load.sort(dim=1, stable=True).indices
        placed.append(torch.empty_like(chunk).scatter_(1, lightest_first, chunk))
        load.scatter_add_(1, lightest_first, weight)
    return torch.stack(placed, dim=2).flatten(1)
