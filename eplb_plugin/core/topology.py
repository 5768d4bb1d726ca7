"""`Topology`: the numbers of nodes, ranks, slots and groups, validated once and frozen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TypeVar

import torch

from .errors import TopologyError, checked_integer

__all__ = ["Topology"]

_Value = TypeVar("_Value")
_MOST = 1 << 20  # nodes, ranks, slots or groups; a mistyped number must not become an allocation


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The expert-parallel group. Slots are numbered rank by rank, ranks node by node.

    Example: 4 nodes, 32 ranks and 288 slots are 8 ranks a node and 9 slots a rank.

    Attributes:
        num_ranks: ranks (GPUs) in the expert-parallel group.
        num_slots: physical experts over all ranks.
        num_nodes: nodes; node `k` holds the `k`-th `num_ranks / num_nodes` ranks.
        num_groups: groups of logical experts in each layer; 1 without group-limited routing.
        rank_slots: slots of each rank, 0 or more, `num_slots` in all. None: `num_slots / num_ranks` each;
            equal numbers become None.

    Raises:
        TopologyError: a number is not a positive integer, ranks or slots do not divide evenly, or
            `rank_slots` is malformed or does not add up.
    """

    num_nodes: int = 1
    num_ranks: int
    num_slots: int
    num_groups: int = 1
    rank_slots: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("num_nodes", "num_ranks", "num_slots", "num_groups"):
            value = checked_integer(name, getattr(self, name), TopologyError, most=_MOST)
            object.__setattr__(self, name, value)
        _check_divides("num_ranks", self.num_ranks, "num_nodes", self.num_nodes)
        if self.rank_slots is not None:
            self._check_rank_slots(self.rank_slots)
        if self.is_even:
            _check_divides("num_slots", self.num_slots, "num_ranks", self.num_ranks)

    def _check_rank_slots(self, given: Iterable[int]) -> None:
        rank_slots = tuple(
            checked_integer(f"rank_slots[{rank}]", slots, TopologyError, least=0, most=_MOST)
            for rank, slots in enumerate(_listed("rank_slots", given, "integers, one"))
        )
        ranks, slots = len(rank_slots), sum(rank_slots)
        if ranks != self.num_ranks:
            raise TopologyError(f"{rank_slots=} is for {ranks} ranks, num_ranks={self.num_ranks}")
        if slots != self.num_slots:
            raise TopologyError(f"{rank_slots=} are {slots} slots in all, num_slots={self.num_slots}")
        # Two spellings of one topology must compare, hash and plan alike.
        even = len(set(rank_slots)) == 1
        object.__setattr__(self, "rank_slots", None if even else rank_slots)

    @property
    def is_even(self) -> bool:
        """Whether all ranks have the same number of slots."""
        return self.rank_slots is None

    @property
    def slots_per_rank(self) -> int:
        """Slots of every rank. Raises TopologyError if ranks differ: use `slots_by_rank`."""
        if self.rank_slots is not None:
            raise TopologyError(
                f"rank_slots={self.rank_slots}: this needs equally many slots on every rank, and ranks differ"
            )
        return self.num_slots // self.num_ranks

    @cached_property
    def slots_by_rank(self) -> tuple[int, ...]:
        """Slots of each rank, for even and uneven topologies."""
        return self.rank_slots or (self.slots_per_rank,) * self.num_ranks

    @cached_property
    def first_slots(self) -> tuple[int, ...]:
        """[num_ranks + 1]: the first slot of each rank, and `num_slots`."""
        return tuple(accumulate(self.slots_by_rank, initial=0))

    @property
    def most_slots(self) -> int:
        """Maximum number of slots of a rank."""
        return max(self.slots_by_rank)

    @cached_property
    def has_like_nodes(self) -> bool:
        """Whether all nodes have the same sequence of slots per rank."""
        first_node = self.slots_by_rank[: self.ranks_per_node]
        return self.slots_by_rank == first_node * self.num_nodes

    @property
    def ranks_per_node(self) -> int:
        return self.num_ranks // self.num_nodes

    @property
    def slots_per_node(self) -> int:
        """Slots of every node. Raises TopologyError if nodes differ."""
        if not self.has_like_nodes:
            raise TopologyError(
                f"rank_slots={self.rank_slots}: this needs the same slots on all {self.num_nodes} nodes"
            )
        return self.num_slots // self.num_nodes

    def is_hierarchical(self, num_logical: int) -> bool:
        """Whether groups can be packed to nodes.

        Nodes must be alike and divide the groups, and the groups must divide the `num_logical` experts.
        """
        divides = self.num_groups % self.num_nodes == 0 and num_logical % self.num_groups == 0
        return divides and self.has_like_nodes

    def check_experts(self, num_logical: int) -> None:
        """Raise TopologyError if there are fewer slots than logical experts."""
        num_logical = checked_integer("num_logical", num_logical, TopologyError)
        if num_logical > self.num_slots:
            raise TopologyError(f"{num_logical=} experts do not fit into num_slots={self.num_slots}")

    def living_ranks(self, active_ranks: Sequence[bool] | torch.Tensor | None) -> tuple[bool, ...]:
        """Validate `active_ranks`: bool [ranks], or None for all ranks.

        Raises:
            TopologyError: not one bool for each rank, or no rank is alive.
        """
        if active_ranks is None:
            return (True,) * self.num_ranks
        if isinstance(active_ranks, torch.Tensor):
            if active_ranks.dtype != torch.bool or active_ranks.dim() != 1:
                kind = f"{active_ranks.dtype} {tuple(active_ranks.shape)}"
                raise TopologyError(f"active_ranks is {kind}, not bool [{self.num_ranks}]")
            active_ranks = active_ranks.tolist()
        alive = _listed("active_ranks", active_ranks, "a bool")
        for rank, value in enumerate(alive):
            if not isinstance(value, bool):
                raise TopologyError(f"active_ranks has {value!r} for rank {rank}, not a bool")
        if len(alive) != self.num_ranks:
            raise TopologyError(f"active_ranks is for {len(alive)} ranks, num_ranks={self.num_ranks}")
        if not any(alive):
            raise TopologyError(f"active_ranks leaves none of {self.num_ranks} ranks alive")
        return alive

    def rank_of_slot(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Rank of each slot: int64 [slots]."""
        if self.is_even:
            return torch.arange(self.num_slots, device=device) // self.slots_per_rank
        ranks = [rank for rank, slots in enumerate(self.slots_by_rank) for _ in range(slots)]
        return torch.tensor(ranks, device=device)

    def slots_of_rank(self, rank: int) -> slice:
        """The slots of `rank`, as a slice of any slot axis."""
        if rank not in range(self.num_ranks):
            raise TopologyError(f"rank={rank} is outside 0..{self.num_ranks - 1}")
        return slice(self.first_slots[rank], self.first_slots[rank + 1])

    def by_rank(self, values: torch.Tensor, filler: float) -> torch.Tensor:
        """Reshape [..., slots] to [..., ranks, most_slots]; shorter ranks are padded with `filler`."""
        if self.is_even:
            return values.reshape(*values.shape[:-1], self.num_ranks, self.slots_per_rank)
        filled = values.new_full((*values.shape[:-1], self.num_ranks * self.most_slots), filler)
        filled[..., self._places.to(values.device)] = values
        return filled.view(*values.shape[:-1], self.num_ranks, self.most_slots)

    def from_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Inverse of `by_rank`: [..., ranks, most_slots] to [..., slots], padding removed."""
        flat = values.flatten(-2)
        return flat if self.is_even else flat[..., self._places.to(values.device)]

    @cached_property
    def _places(self) -> torch.Tensor:
        """int64 [slots] on the CPU: index of each slot in the padded table, flattened."""
        places = [
            rank * self.most_slots + place
            for rank, slots in enumerate(self.slots_by_rank)
            for place in range(slots)
        ]
        return torch.tensor(places, device="cpu")


def _listed(name: str, values: Iterable[_Value], wanted: str) -> tuple[_Value, ...]:
    """The values as a tuple; raises TopologyError if they cannot be iterated over."""
    try:
        return tuple(values)
    except TypeError:
        kind = type(values).__name__
        raise TopologyError(f"{name} is of type {kind}, not {wanted} for each rank") from None


def _check_divides(name: str, value: int, part_name: str, parts: int) -> None:
    """Raise TopologyError unless `parts` divides `value`; it names the nearest multiples."""
    if value % parts:
        below = value // parts * parts
        right = f"{below} or {below + parts}" if below else f"{parts}"
        raise TopologyError(f"{name}={value} is not divisible by {part_name}={parts}; {right} would be")
