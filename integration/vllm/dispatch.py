"""Dispatch `balanced` in vLLM: a mapping from experts to slots in place of vLLM's own."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any, Literal

import torch

from ...core.errors import ConfigError
from ...core.topology import Topology
from ...dispatch.batch_split import BatchSplit
from ...dispatch.expert_cost import resolve_expert_cost
from ...dispatch.tables import LayerTables
from ..common.agreement import announce
from ..common.options import EngineOptions
from ..common.replacement import replace_function
from ..common.shares import DispatchInForce

__all__ = ["BalancedMapping", "bind_dispatch", "restore_mapping", "token_copies", "token_layout"]

_logger = logging.getLogger(__name__)

_MODULE = "vllm.model_executor.layers.fused_moe.router.base_router"
_NAME = "eplb_map_to_physical_and_record"

TokenLayout = Literal["replicated", "sharded"]
"""Whether every rank has all tokens of a batch where experts are mapped to slots, or tokens of its own."""


class BalancedMapping:
    """In place of `eplb_map_to_physical_and_record`, which vLLM calls for each layer and batch.

    Args:
        split: of the batches of this rank.
        own: vLLM's function. It goes on counting the tokens.
        num_logical: logical experts.
        width: replicas that a row of vLLM's map has room for.
        num_slots: over all ranks.
    """

    def __init__(
        self,
        split: BatchSplit,
        own: Callable[..., torch.Tensor],
        num_logical: int,
        width: int,
        num_slots: int,
    ) -> None:
        self.split = split
        self.own = own
        # Constants exist before a graph is captured. Inference tensors refuse uses outside of that mode.
        with torch.inference_mode(False):
            self._first = torch.arange(num_logical, device=split.device) * width
            self._same = torch.arange(num_slots, device=split.device).unsqueeze(1)
            self._single = torch.ones(num_slots, dtype=torch.int64, device=split.device)

    def __call__(
        self,
        topk_ids: torch.Tensor,
        expert_load_view: torch.Tensor,
        logical_to_physical_map: torch.Tensor,
        logical_replica_count: torch.Tensor,
        record_enabled: torch.Tensor,
        num_unpadded_tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Signature and effects of vLLM's function. Where tokens are sharded, all ranks call it together.

        Args:
            topk_ids: integer [tokens, top_k], logical experts; -1 stays -1.
            expert_load_view: int32 [slots], the tokens of each slot, counted up.
            logical_to_physical_map: int64 [logical, width], slots of each expert in rising order, then -1.
            logical_replica_count: int64 [logical].
            record_enabled: bool [], whether tokens are counted.
            num_unpadded_tokens: int32 [], tokens behind that many are padding and not counted.

        Returns:
            Shape and dtype of `topk_ids`: slots.
        """
        ids = topk_ids if topk_ids.dtype in (torch.int32, torch.int64) else topk_ids.to(torch.int64)
        replicas = LayerTables(logical_to_physical_map.view(-1), self._first, logical_replica_count)
        counted = None if num_unpadded_tokens is None else num_unpadded_tokens.view(1)
        slots = self.split.slots(ids, replicas, counted)
        # vLLM counts, and maps each slot to itself.
        self.own(
            topk_ids=slots,
            expert_load_view=expert_load_view,
            logical_to_physical_map=self._same,
            logical_replica_count=self._single,
            record_enabled=record_enabled,
            num_unpadded_tokens=num_unpadded_tokens,
        )
        return slots.to(topk_ids.dtype)


def bind_dispatch(state: Any, options: EngineOptions, group: Any) -> DispatchInForce | None:
    """Put the dispatch of `options` in force in this process. All ranks call it together after each model.

    Where vLLM lacks a seam, or the layout of tokens is unknown, an error is logged. vLLM's own mapping then
    goes on.

    Args:
        state: an `EplbState` with one model or more.
        group: vLLM's group of expert-parallel ranks.

    Returns:
        The dispatch in force; None where vLLM's own mapping is.

    Raises:
        ConfigError: `expert_cost` is `auto` and the accelerator is unknown.
        AgreementError: `auto` means another cost on another rank.
    """
    restore_mapping()
    if options.dispatch != "balanced":
        return None
    models = list(state.model_states.values())
    try:
        own = _own_mapping()
        layouts = {token_layout(one.model, state.parallel_config) for one in models}
        if len(layouts) > 1:
            raise ConfigError("one model has tokens of its own on each rank, another one does not")
        table = models[0].logical_to_physical_map
        if table.device.type not in ("cpu", "cuda"):
            raise ConfigError(f"there is no split of batches on a device of type {table.device.type}")
    except (AttributeError, ConfigError) as error:
        # Attributes that are read here may be gone from a later vLLM.
        _logger.error("dispatch=balanced is not possible: %s. vLLM's own mapping goes on", error)
        return None
    (layout,) = layouts
    model = models[0].model
    cost = resolve_expert_cost(options.expert_cost, model.expert_weights[0], table.device)
    if options.expert_cost == "auto":
        # Ranks with other accelerators would split the same batch differently.
        announce(f"expert_cost={cost}")(group.ranks)
    ranks, slots = group.world_size, model.num_physical_experts
    split = BatchSplit(
        Topology(num_ranks=ranks, num_slots=slots),
        rank=group.rank_in_group,
        expert_cost=cost,
        gather=functools.partial(_gather_counts, group) if layout == "sharded" else None,
        device=table.device,
    )
    replace_function(own, BalancedMapping(split, own, *table.shape[1:], slots))
    if group.rank_in_group == 0:
        size = model.num_logical_experts * 8
        message = f"one all-gather of {size} bytes a rank" if layout == "sharded" else "no message"
        _logger.info(
            "eplb_plugin: dispatch=balanced: tokens are %s, %s for each layer and batch; expert_cost=%d",
            layout,
            message,
            cost,
        )
    return DispatchInForce(cost, copies=1 if layout == "sharded" else ranks)


def restore_mapping() -> None:
    """Put vLLM's own mapping back wherever ours is."""
    ours = getattr(sys.modules.get(_MODULE), _NAME, None)
    if isinstance(ours, BalancedMapping):
        replace_function(ours, ours.own)


def token_layout(model: Any, parallel: Any) -> TokenLayout:
    """Whether the ranks have the same tokens where the experts of `model` are mapped to slots.

    Ranks that compute parts of the same token's sum have to map it alike. Where each rank has tokens of its
    own, every mapping is followed by vLLM's own dispatch among all ranks, so all ranks map equally often.

    Args:
        model: a `MixtureOfExperts` whose kernels are made.
        parallel: vLLM's `ParallelConfig`.

    Raises:
        ConfigError: neither, or it is not known.
    """
    if parallel.enable_elastic_ep:
        raise ConfigError("elastic expert parallelism changes the number of ranks")
    found = {_layout_of(index, layer, parallel) for index, layer in enumerate(model.moe_layers)}
    if len(found) != 1:
        raise ConfigError(f"{len(model.moe_layers)} MoE layers have tokens {' and '.join(sorted(found))}")
    (layout,) = found
    if layout == "sharded" and parallel.use_ubatching:
        raise ConfigError("dual batch overlap (--enable-dbo) would send the counts of two batches at once")
    if layout == "sharded" and getattr(parallel, "enable_fault_tolerance", False):
        raise ConfigError("fault tolerance goes on without lost ranks; an all-gather waits for them")
    return layout


def _layout_of(index: int, layer: Any, parallel: Any) -> TokenLayout:
    """The layout of one MoE layer: a `MoERunner`, or a fused kernel that dispatches by itself."""
    if not hasattr(layer, "moe_config") and hasattr(layer, "get_symm_buffer"):
        return "sharded"  # MegaMoE: the kernel sends off the tokens that its rank has
    config = layer.moe_config
    if layer.is_monolithic:
        raise ConfigError(f"the kernel of MoE layer {index} chooses the experts itself")
    if layer.do_naive_dispatch_combine:
        # Each rank has all tokens then, but knows of the padding in its own alone.
        raise ConfigError(f"the tokens of all ranks are gathered before MoE layer {index} chooses experts")
    if config.is_sequence_parallel:
        return "sharded"
    if config.dp_size * config.pcp_size == 1:
        return "replicated"
    if parallel.tensor_parallel_size == 1:
        return "sharded"
    raise ConfigError(
        f"tensor parallelism {parallel.tensor_parallel_size}, data parallelism {config.dp_size} and prefill "
        f"context parallelism {config.pcp_size}: MoE layer {index} is not sequence parallel, so some ranks "
        "share tokens that others do not have"
    )


def token_copies(model: Any, parallel: Any, ranks: int) -> int:
    """Ranks that count each token of a batch, by the first MoE layer of a model.

    Args:
        model: a `MixtureOfExperts` whose kernels are made.
        parallel: vLLM's `ParallelConfig`.
        ranks: of the expert-parallel group.
    """
    layer = model.moe_layers[0]
    if not hasattr(layer, "moe_config"):
        return 1  # MegaMoE: each rank counts the tokens that it has
    if layer.do_naive_dispatch_combine:
        return ranks  # the tokens of all ranks are gathered first
    return 1 if layer.moe_config.is_sequence_parallel else int(parallel.tensor_parallel_size)


def _own_mapping() -> Callable[..., torch.Tensor]:
    """vLLM's mapping. Raises ConfigError: there is none, or it takes other arguments."""
    try:
        own: Callable[..., torch.Tensor] = getattr(importlib.import_module(_MODULE), _NAME)
    except (ImportError, AttributeError):
        raise ConfigError(f"this vLLM lacks {_MODULE}.{_NAME}") from None
    wanted = list(inspect.signature(BalancedMapping.__call__).parameters)[1:]
    taken = list(inspect.signature(own).parameters)
    if taken != wanted:
        raise ConfigError(f"this vLLM's {_NAME} takes ({', '.join(taken)}), not ({', '.join(wanted)})")
    return own


def _gather_counts(group: Any, counts: torch.Tensor) -> torch.Tensor:
    """[ranks, logical] from this rank's [logical], by vLLM's own collective, which graphs can capture."""
    gathered: torch.Tensor = group.all_gather(counts.unsqueeze(0), dim=0)
    return gathered
