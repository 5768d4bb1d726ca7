"""Replay of dispatches: what each rank gets to do in recorded steps, each taken as one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch

from ..core.balancedness import balancedness, balancedness_of_peaks, filled_ranks
from ..core.errors import ConfigError, TraceError
from ..core.placement import Placement
from ..core.topology import Topology
from ..dispatch.balance_batch import balance_batch, checked_cost
from ..dispatch.rank_costs import even_batch, rank_costs
from .linear_program import best_split

__all__ = [
    "SPLITS",
    "BatchScore",
    "SplitSteps",
    "find_split",
    "has_whole_counts",
    "score",
    "whole_counts",
]

SplitSteps = Callable[[torch.Tensor, Placement, Topology, int, tuple[int, ...]], torch.Tensor]
"""(counts int64 [steps, layers, logical], placement, topology, expert_cost, seed) to tokens of each slot,
int64 [steps, layers, slots]."""

_MOST_CELLS = 2**22  # of a table of steps, layers and slots: a bound on scratch memory


class BatchScore(NamedTuple):
    """What a dispatch makes of some steps.

    Attributes:
        balancedness: mean over the steps.
        peak_cost: the cost of the slowest rank, summed over steps and layers, in tokens.
        mean_load: the mean load of a rank, summed likewise.
    """

    balancedness: float
    peak_cost: int
    mean_load: float


def _even(
    counts: torch.Tensor, placement: Placement, topology: Topology, expert_cost: int, seed: tuple[int, ...]
) -> torch.Tensor:
    return even_batch(counts, placement)


def _balanced(
    counts: torch.Tensor, placement: Placement, topology: Topology, expert_cost: int, seed: tuple[int, ...]
) -> torch.Tensor:
    return balance_batch(counts, placement, topology, expert_cost=expert_cost)


def _sampled(
    counts: torch.Tensor, placement: Placement, topology: Topology, expert_cost: int, seed: tuple[int, ...]
) -> torch.Tensor:
    """The replica of each token is drawn by the shares of the linear program, as SGLang's `lp` does."""
    slots = placement.logical_to_physical.numpy()
    best = best_split(counts, placement, topology).numpy()
    drawn = np.zeros(best.shape, np.int64)
    rng = np.random.default_rng(seed)
    layer = np.arange(slots.shape[0])[:, None, None]
    for step, given in enumerate(counts.numpy()):
        shares = np.where(slots < 0, 0.0, best[step][layer, slots])
        # Experts without tokens draw none, from any shares.
        shares[..., 0] += given == 0
        each = rng.multinomial(given, shares / shares.sum(-1, keepdims=True))
        np.add.at(drawn[step], (np.broadcast_to(layer, slots.shape), slots), np.where(slots < 0, 0, each))
    return torch.from_numpy(drawn)


SPLITS: Mapping[str, SplitSteps] = MappingProxyType(
    {"even": _even, "balanced": _balanced, "sampled": _sampled}
)
"""The splits of whole batches, by name. `sampled` ignores `expert_cost`; the seed is for its draws."""


def find_split(name: str) -> SplitSteps:
    """The split of the dispatch `name`.

    Raises:
        ConfigError: there is none; the message lists the names.
    """
    if name not in SPLITS:
        raise ConfigError(f"no dispatch {name!r} to replay; there are {', '.join(SPLITS)}")
    return SPLITS[name]


def score(
    name: str,
    steps: torch.Tensor,
    placement: Placement,
    topology: Topology,
    *,
    expert_cost: int = 0,
    seed: tuple[int, ...] = (0,),
) -> BatchScore:
    """Replay steps under a dispatch, each as one batch.

    The balancedness is that of tokens, for `even` in fractions of them, as everywhere in the package. The
    cost is that of whole tokens, also for `even`.

    Args:
        name: of `SPLITS`.
        steps: [steps, layers, logical], tokens, whole numbers.
        expert_cost: least cost of a replica in use, in tokens.
        seed: of `sampled`.

    Raises:
        ConfigError: unknown dispatch. LoadError, PlacementError: see `balance_batch`. TraceError: a number of
            tokens is no whole number.
    """
    split, cost = find_split(name), checked_cost(expert_cost)
    counts = whole_counts(steps, "the load")
    each = max(1, _MOST_CELLS // placement.physical_to_logical.numel())
    loads, costs = [], 0
    for at in range(0, len(counts), each):
        part = counts[at : at + each]
        tokens = split(part, placement, topology, cost, (*seed, at))
        loads.append(rank_costs(tokens, topology, 0).amax(2).double())
        costs += int(rank_costs(tokens, topology, cost).amax(2).sum())
    mean = counts.sum(2).double() / int(filled_ranks(placement, topology).sum())
    even = name == "even"
    found = (
        balancedness(steps, placement, topology) if even else balancedness_of_peaks(mean, torch.cat(loads))
    )
    return BatchScore(found, costs, float(mean.sum()))


def has_whole_counts(load: torch.Tensor) -> bool:
    """Whether all loads are whole numbers, as those of batches are; means over steps are not."""
    return not load.is_floating_point() or bool((load == load.floor()).all())


def whole_counts(load: torch.Tensor, name: str) -> torch.Tensor:
    """The load as int64 counts of tokens.

    Args:
        load: [steps, layers, logical].
        name: of the load, for errors.

    Raises:
        TraceError: a value is not a whole number: such a load is a mean, and no batch.
    """
    counts = load.to(torch.int64)
    if load.is_floating_point() and bool((bad := counts != load).any()):
        step, layer, expert = (int(x) for x in bad.nonzero()[0])
        raise TraceError(
            f"{name}: step {step}, layer {layer}, expert {expert} has {float(load[step, layer, expert]):g} "
            "tokens; dispatch is judged on batches, whose counts are whole numbers"
        )
    return counts
