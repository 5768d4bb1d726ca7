"""The search for silent failures in a model that vLLM has loaded: its weights, its window, its steps."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...core.topology import Topology
from ...runtime.control.rank_group import RankGroup
from ...runtime.verify.fingerprints import describe_differing, differing_replicas, fingerprint_slots
from ...runtime.verify.unregistered import search_unregistered
from ...runtime.weights.expert_weights import byte_rows
from ..common.planner import EnginePlanner
from .warnings import layer_ids_of, long_window, model_names, never_stepped

__all__ = ["check_start", "check_weights"]

_logger = logging.getLogger(__name__)


def check_start(state: Any, planner: EnginePlanner, ranks: Callable[[], RankGroup]) -> None:
    """All ranks, before the first plan: warn of what vLLM does silently. Raises nothing.

    Args:
        state: an `EplbState`; its last model is looked at.
        planner: of this model, counts warnings.
        ranks: gives all ranks of the expert-parallel group.
    """
    name, model_state = model_names(state)[-1], list(state.model_states.values())[-1]

    def warn(cause: str, line: str) -> None:
        planner.warn(cause, f"{name}: {line}")

    # With elastic expert parallelism, a rank that joins loads its model alone.
    if getattr(getattr(state, "parallel_config", None), "enable_elastic_ep", False):
        ranks = functools.partial(RankGroup, alone=True)
    check_weights(model_state.model, model_state.physical_to_logical_map, ranks, warn)
    for cause, look in {"long_window": lambda: long_window(state), "never_stepped": never_stepped}.items():
        try:
            line = look()
        except Exception:
            _logger.exception("%s could not be checked; it goes on", cause)
            continue
        if line is not None:
            warn(cause, line)


def check_weights(
    model: Any,
    physical_to_logical: torch.Tensor,
    ranks: Callable[[], RankGroup],
    warn: Callable[[str, str], object],
) -> None:
    """All ranks, before the first plan: look at the weights of a loaded model. Raises nothing.

    Args:
        model: a `MixtureOfExperts` of vLLM.
        physical_to_logical: integer [layers, slots], the map in force.
        ranks: gives all ranks of the expert-parallel group; or this rank alone, which compares no replicas.
        warn: gets a cause and a line, on every rank alike.
    """
    checks = {
        "unmoved_tensors": ("whether vLLM moves all weights of the experts", _unmoved),
        "differing_replicas": ("whether replicas of an expert have the same weights", _differing),
    }
    for cause, (question, check) in checks.items():
        try:
            numbers = layer_ids_of(model) or range(len(model.expert_weights))
            line = check(model, physical_to_logical.to("cpu", torch.int64), ranks(), numbers)
        except Exception:
            _logger.exception("%s could not be checked; it goes on", question)
            continue
        if line:
            warn(cause, line)


def _unmoved(model: Any, ids: torch.Tensor, ranks: RankGroup, numbers: Sequence[int]) -> str:
    experts = [getattr(layer, "routed_experts", layer) for layer in model.moe_layers]
    slots = model.num_local_physical_experts
    return search_unregistered(ranks, experts, model.expert_weights, slots, numbers)


def _differing(model: Any, ids: torch.Tensor, ranks: RankGroup, numbers: Sequence[int]) -> str:
    if model.num_local_physical_experts * ranks.size != ids.shape[1]:
        return ""  # this rank alone: the other slots cannot be read
    topology = Topology(num_ranks=ranks.size, num_slots=ids.shape[1])

    def read() -> list[list[torch.Tensor]]:
        slots, layers = model.num_local_physical_experts, zip(numbers, model.expert_weights, strict=True)
        return [[byte_rows(each, f"a weight of layer {n}", slots) for each in layer] for n, layer in layers]

    rows = ranks.attempt("reading the experts' weights", read)
    found, _ = fingerprint_slots(
        [[row for row in layer if row.numel()] for layer in rows], topology, ranks, "sampled"
    )
    differs = differing_replicas(found, ids, model.num_logical_experts)
    if not bool(differs.any()):
        return ""
    also = " (slots that were not loaded, or --load-format dummy)"
    return describe_differing(differs, numbers, also=also)
