"""Routing to replicas and running a part of the experts, in plain torch operations."""

import functools

import torch

KNUTH = 2654435769  # spreads the tokens over the replicas as vLLM's kernel does


def map_and_count():
    """(3) Logical to physical experts, and the count of their tokens."""
    from vllm.model_executor.layers.fused_moe.router import base_router

    base_router.eplb_map_to_physical_and_record = to_physical


def to_physical(
    topk_ids,
    expert_load_view,
    logical_to_physical_map,
    logical_replica_count,
    record_enabled,
    num_unpadded_tokens=None,
):
    """[tokens, top_k] logical ids to physical ids; `expert_load_view [slots]` is counted up."""
    tokens = torch.arange(topk_ids.shape[0], device=topk_ids.device).unsqueeze(1)
    ids = topk_ids.long()
    replica = (tokens * KNUTH & 0xFFFFFFFF) % logical_replica_count[ids].clamp_min(1)
    physical = logical_to_physical_map[ids, replica]
    if bool(record_enabled):
        real = physical if num_unpadded_tokens is None else physical[: int(num_unpadded_tokens)]
        flat = real.flatten()
        expert_load_view.scatter_add_(0, flat, torch.ones_like(flat, dtype=expert_load_view.dtype))
    return physical.to(topk_ids.dtype)


def with_expert_map():
    """(4) Experts of other ranks: id 0 with weight 0."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    original = CPUUnquantizedExperts.apply

    @functools.wraps(original)
    def apply(self, *, topk_weights, topk_ids, expert_map, **rest):
        if expert_map is not None:
            local = expert_map[topk_ids.long()]
            absent = local < 0
            topk_weights = topk_weights.masked_fill(absent, 0)
            topk_ids = local.masked_fill(absent, 0).to(topk_ids.dtype)
        original(self, topk_weights=topk_weights, topk_ids=topk_ids, expert_map=expert_map, **rest)

    CPUUnquantizedExperts.apply = apply
