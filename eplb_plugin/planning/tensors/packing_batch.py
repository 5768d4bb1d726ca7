"""A batch of packings on tensors: which item is in which place, and what a pack weighs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

__all__ = ["Packings", "over_snapshots"]

_MOST_REPEATS = 7  # that are told apart; with values below 2^50 the order stays exact in float64


def over_snapshots(values: torch.Tensor) -> torch.Tensor:
    """The sum over the snapshots, [B, snapshots, ...]; of a single one it takes no launch."""
    return values[:, 0] if values.shape[1] == 1 else values.sum(1)


@dataclass(frozen=True)
class Packings:
    """B packings of n items each into `num_packs` packs of equal size. No method waits for the device.

    Attributes:
        weight: float64 [B, snapshots, n], exact.
        expert: int64 [B, n], the expert of each item; a pack should hold no expert twice.
        items: int64 [B, n], the item in each place; places are numbered pack by pack.
        num_packs: packs of each packing.
    """

    weight: torch.Tensor
    expert: torch.Tensor
    items: torch.Tensor
    num_packs: int

    @property
    def capacity(self) -> int:
        """Items of a pack."""
        return self.items.shape[1] // self.num_packs

    def weights(self) -> torch.Tensor:
        """What is in each place: float64 [B, snapshots, packs, capacity]."""
        index = self.items[:, None].expand(-1, self.weight.shape[1], -1)
        return self.weight.gather(2, index).view(*index.shape[:2], self.num_packs, -1)

    def experts(self) -> torch.Tensor:
        """Whose replica is in each place: int64 [B, packs, capacity]."""
        return self.expert.gather(1, self.items).view(self.items.shape[0], self.num_packs, -1)

    def repeated(self) -> torch.Tensor:
        """Places whose expert is in an earlier place of the pack too: bool [B, n]."""
        expert = self.experts()
        same = expert[:, :, :, None] == expert[:, :, None]
        return same.tril_(-1).any(3).flatten(1)

    def value(self, objective: str) -> torch.Tensor:
        """What packing minimises, summed over snapshots, of `peak` or `spread`: float64 [B]."""
        load = self.weights().sum(3)
        value = load.amax(2)
        if objective == "spread":
            value = value - load.amin(2)
        return over_snapshots(value)

    def rank(self, objective: str) -> torch.Tensor:
        """Lower is better: fewer repeats before all else, then the value. float64 [B]."""
        repeats = self.repeated().sum(1).clamp_(max=_MOST_REPEATS)
        return repeats * 2.0**50 + self.value(objective)

    def swapped(self, places: torch.Tensor, others: torch.Tensor) -> Packings:
        """Exchange the items of `places` and `others`, both int64 [B, m], no place twice in a row but for
        those that are to stay, where the two are equal."""
        moved = self.items.gather(1, torch.cat([others, places], dim=1))
        return replace(self, items=self.items.scatter(1, torch.cat([places, others], dim=1), moved))

    def chosen(self, rows: torch.Tensor) -> Packings:
        """The packings `rows`, int64 [any]."""
        weight, expert, items = (x.index_select(0, rows) for x in (self.weight, self.expert, self.items))
        return replace(self, weight=weight, expert=expert, items=items)
