"""What the plugin hooks into, calls or reads in SGLang, by the part of it that needs it.

Each table maps a full name to the arguments that are used; of a class: those of its constructor.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ..common.seams import seams_of

__all__ = [
    "HOOKED",
    "INIT_SOLVERS",
    "LAUNCH_HOOK",
    "MAPPING",
    "NEW_METADATA",
    "PLANNING",
    "READ",
    "REPLICATED",
    "RING",
    "SEAMS",
    "SHARDED",
    "STATIC",
    "STATIC_TABLE",
]

_EPLB = "sglang.srt.eplb"
_CONTEXT = "sglang.srt.model_executor.forward_context"
_METADATA = f"{_EPLB}.expert_location.ExpertLocationMetadata"

RING = f"{_EPLB}.expert_distribution._CircularBuffer"
"""SGLang's ring of recorded passes."""

HOOKED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        f"{_EPLB}.eplb_algorithms.compute_algorithm": ("raw_algorithm",),
        f"{_EPLB}.eplb_algorithms.rebalance_experts": (
            "tokens_per_expert",
            "num_physical_experts",
            "num_local_physical_experts",
            "num_groups",
            "num_nodes",
            "algorithm",
        ),
        f"{_EPLB}.expert_location.compute_initial_expert_location_metadata": ("model_config",),
        f"{_EPLB}.eplb_manager.EPLBManager.__init__": ("self",),
        f"{RING}.get_all": ("self",),
    }
)
"""Functions of SGLang with a hook."""

LAUNCH_HOOK = "sglang.srt.arg_groups.resolution_hooks.register_resolution_hook"
"""SGLang's way to check arguments at launch."""

PLANNING: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {**HOOKED, f"{RING}.__init__": (), LAUNCH_HOOK: ("name",)}
)
"""Without one of these, launches with our algorithm stop."""

READ: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "sglang.version.__version__": (),
        "sglang.srt.plugins.hook_registry.HookRegistry.register": ("target", "hook"),
        "sglang.srt.plugins.hook_registry.HookType.AROUND": (),
        "sglang.srt.runtime_context.get_exec": (),
        "sglang.srt.runtime_context.get_parallel": (),
        "sglang.srt.runtime_context.get_serving": (),
        f"{_EPLB}.expert_location.get_global_expert_location_metadata": (),
        f"{_EPLB}.expert_location.ModelConfigForExpertLocation.from_model_config": ("model_config",),
        f"{_EPLB}.expert_location.ModelConfigForExpertLocation.num_logical_experts": (),
        "sglang.srt.model_loader.utils.get_model_architecture": ("model_config",),
        f"{_METADATA}.ep_size": (),
        f"{_METADATA}.num_logical_experts": (),
        f"{_METADATA}.num_physical_experts": (),
        f"{_METADATA}.physical_to_logical_map": (),
        f"{_METADATA}.physical_to_logical_map_cpu": (),
        f"{_EPLB}.eplb_manager.EPLBManager._get_model": (),
        f"{_EPLB}.eplb_manager.EPLBManager.on_forward_pass_end": (),
        f"{RING}._curr_index": (),
        "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.layer_id": (),
        "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.num_local_experts": (),
        "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.top_k": (),
    }
)
"""What is read once a model is loaded; checked in wheels alone, since it takes many imports."""

MAPPING = f"{_EPLB}.expert_location_dispatch.topk_ids_logical_to_physical"
"""SGLang's mapping from experts to slots."""

STATIC_TABLE = f"{_EPLB}.expert_location.compute_logical_to_rank_dispatch_physical_map"
"""SGLang's way to make the table of dispatch `static`: when the model loads, and at each rebalance."""

NEW_METADATA = f"{_METADATA}._init_raw"
"""What calls it, with the whole map."""

STATIC: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        NEW_METADATA: ("ep_size", "physical_to_logical_map", "logical_to_all_physical_map"),
        STATIC_TABLE: ("logical_to_all_physical_map", "ep_size", "num_physical_experts", "ep_rank"),
        f"{_METADATA}.logical_to_rank_dispatch_physical_map": (),
    }
)
"""The fair table of dispatch `static`."""

INIT_SOLVERS = "sglang.srt.model_executor.model_runner_components.moe_ep_setup.init_lplb_solvers"
"""SGLang's way to make its solvers: when the model loads, and after each change of the map."""

REPLICATED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        MAPPING: ("topk_ids", "info", "log2phy_prob"),
        f"{_EPLB}.expert_location_dispatch.ExpertLocationDispatchInfo": (
            "ep_dispatch_algorithm",
            "partial_logical_to_all_physical_map",
            "partial_logical_to_all_physical_map_num_valid",
        ),
        f"{_CONTEXT}.has_forward_context": (),
        f"{_CONTEXT}.ForwardContext": ("moe_num_token_non_padded",),
        "sglang.srt.arg_groups.overrides.resolved_view": ("server_args",),
        "sglang.srt.layers.moe.utils.is_moe_input_scattered_across_dp_ranks": (),
    }
)
"""Dispatch `balanced` where every rank has all tokens."""

SHARDED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **REPLICATED,
        INIT_SOLVERS: ("model_config",),
        f"{_EPLB}.lplb_solver.assert_lplb_supported_model": ("architecture",),
        f"{_EPLB}.lplb_solver.set_global_lplb_solver": ("layer_id", "solver"),
        "sglang.srt.distributed.parallel_state.GroupCoordinator.all_gather": ("input_", "dim"),
    }
)
"""Dispatch `balanced` where each rank has its own tokens."""

SEAMS = seams_of({**PLANNING, **READ, **STATIC, **SHARDED})
"""All of them."""
