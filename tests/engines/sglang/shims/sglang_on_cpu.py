"""A plugin for SGLang that lets its plain-torch MoE run expert-parallel on a CPU."""

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType


def register():
    # What SGLang calls on every device module, and torch.cpu lacks.
    torch.cpu.empty_cache = lambda: None
    HookRegistry.register(
        "sglang.srt.layers.moe.fused_moe_native.moe_forward_native", _local_experts_only, HookType.AROUND
    )


def _local_experts_only(original, layer, x, topk_output, moe_runner_config):
    """`original` wants each token to name distinct experts of this rank. Choices that belong to another rank
    (-1), or come twice, become distinct experts of weight zero."""
    weights, ids, _ = topk_output
    tokens, top_k = ids.shape
    num_local = layer.num_local_experts
    used = torch.zeros(tokens, num_local, dtype=torch.bool)
    new_ids, new_weights = ids.clone(), weights.clone()
    for choice in range(top_k):
        own = ids[:, choice]
        here = own >= 0
        repeated = here & used.gather(1, own.clamp(min=0).long().unsqueeze(1)).squeeze(1)
        used[here, own[here].long()] = True
        new_weights[:, choice] = torch.where(here & ~repeated, weights[:, choice], 0)
        new_ids[:, choice] = torch.where(here & ~repeated, own, -1)
        # A repeated choice adds to the weight of the first.
        for token in repeated.nonzero().flatten().tolist():
            first = int((ids[token] == own[token]).nonzero()[0])
            new_weights[token, first] += weights[token, choice]
    for choice in range(top_k):
        empty = (new_ids[:, choice] < 0).nonzero().flatten()
        spare = (~used[empty]).to(torch.int8).argmax(1)
        new_ids[empty, choice] = spare.to(new_ids.dtype)
        used[empty, spare] = True
    return original(
        layer, x, topk_output._replace(topk_weights=new_weights, topk_ids=new_ids), moe_runner_config
    )
