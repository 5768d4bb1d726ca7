"""Plans for dispatch `balanced`: the plan for the even split, improved for single steps after their split."""

from __future__ import annotations

import torch

from ..config.options import PlannerOptions
from ..core.load import sum_over_last
from ..core.placement import Placement
from ..core.topology import Topology
from .anti_affinity import shared_replicas
from .elastic import held_slots
from .hierarchy import groups_within_nodes
from .kernels.api import improve_splits

__all__ = ["expected_samples", "improve_for_dispatch"]

_PRICE_AFTER_SPLIT = 1 / 6  # measured: the split takes most of what exchanges gain without it


def expected_samples(samples: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Scale the experts of single steps to the shares that are expected next.

    So steps keep their chance. An expert without tokens in any step gets its expected share in each.

    Example: an expert had 2 % of all tokens and is expected to have 3 %. In each step it gets 1.5 times its
    tokens.

    Args:
        samples: float64 [steps, layers, logical], tokens.
        expected: float64 [snapshots, layers, logical], the load that is expected next.

    Returns:
        float64 [steps, layers, logical], tokens.
    """
    tokens = sum_over_last(samples).unsqueeze(2)
    seen, wanted = _shares(samples), _shares(expected)
    return torch.where(seen > 0, samples * (wanted / seen.clamp(min=1e-300)), wanted * tokens)


def _shares(load: torch.Tensor) -> torch.Tensor:
    """float64 [layers, logical], of the tokens of all steps; 0 for a layer without any."""
    total = sum_over_last(load.permute(1, 2, 0).contiguous())
    return total / sum_over_last(total).unsqueeze(1).clamp(min=1e-300)


def improve_for_dispatch(
    samples: torch.Tensor,
    topology: Topology,
    ids: torch.Tensor,
    in_force: Placement | None,
    options: PlannerOptions,
) -> torch.Tensor:
    """Improve a plan for the even split, or the placement in force where that is better already.

    Args:
        samples: float64 [steps, layers, logical] on the CPU, tokens of single steps that are expected next.
        ids: int64 [layers, slots], the plan for the even split; so is the result.
        in_force: what moves are counted from; None: no placement is.
        options: with `move_price` and `max_moves`.
    """
    if in_force is None:
        return improve_splits(samples, topology, ids, [ids], price=0.0, max_moves=None)
    held, start = held_slots(in_force).cpu(), in_force.physical_to_logical.cpu()
    # The placement in force, in the layers where it keeps the rules.
    sound = (held >= 0).all(1) & groups_within_nodes(start, samples.shape[2], topology)
    sound &= ~shared_replicas(start, topology).any(1)
    starts = [ids, torch.where(sound[:, None], start, ids)]
    price = _PRICE_AFTER_SPLIT * options.known_price * topology.num_ranks / topology.num_slots
    return improve_splits(samples, topology, held, starts, price=price, max_moves=options.max_moves)
