"""The ensemble: many orders in which the items of a row can be handed out."""

from __future__ import annotations

import torch

from .exact import row_hash, uniform_noise

__all__ = ["FIXED_ORDERS", "OrderEnsemble"]

FIXED_ORDERS = 2  # LPT and zigzag; all further candidates are random


class OrderEnsemble:
    """Orders of the items of each row; candidate `k` is the same whenever and wherever it is asked for.

    Candidate 0 is LPT (heaviest first), 1 is zigzag (heaviest, lightest, second heaviest, ...). Of the
    others the even ones are LPT on weights times noise in [0.8, 1.2), the odd ones are random orders.

    Args:
        exact: float64 [snapshots, X, n] from `to_exact`.
        seed: seed of the noise.
    """

    def __init__(self, exact: torch.Tensor, seed: int) -> None:
        self._total = exact.sum(0)
        self._row_seed = row_hash(exact)
        self._seed = seed

    def orders(self, rows: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Candidates `first..last-1` of the given rows: int64 [rows, last - first, n], item ids."""
        total = self._total[rows]
        parts = []
        if first < FIXED_ORDERS:
            parts.append(self._fixed(total)[:, first : min(last, FIXED_ORDERS)])
        if last > FIXED_ORDERS:
            number = torch.arange(max(first, FIXED_ORDERS), last, device=total.device)
            noise = uniform_noise(self._row_seed[rows], self._seed, number, total.shape[1])
            noisy_lpt = total[:, None, :] * (0.8 + 0.4 * noise)
            key = torch.where((number % 2 == 0)[None, :, None], noisy_lpt, noise)
            parts.append(key.sort(dim=2, descending=True, stable=True).indices)
        return torch.cat(parts, dim=1)

    @staticmethod
    def _fixed(total: torch.Tensor) -> torch.Tensor:
        lpt = total.sort(dim=1, descending=True, stable=True).indices
        num_items = total.shape[1]
        half = (num_items + 1) // 2
        position = torch.arange(num_items, device=total.device)
        zigzag = torch.empty_like(position)
        zigzag[0::2] = position[:half]
        zigzag[1::2] = position[half:].flip(0)
        return torch.stack([lpt, lpt[:, zigzag]], dim=1)
