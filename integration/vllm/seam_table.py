"""What the plugin wraps, calls or reads in vLLM, by the part of it that is lost where one is missing."""

from __future__ import annotations

from ..common.seams import Seam

__all__ = ["CHECKING", "DISPATCH", "PLANNING", "SEAMS"]

_EPLB = "vllm.distributed.eplb"
_STATE = f"{_EPLB}.eplb_state.EplbState"
_MODEL_STATE = f"{_EPLB}.eplb_state.EplbModelState"
_MODEL = "vllm.model_executor.models.interfaces.MixtureOfExperts"
_WORKER = "vllm.v1.worker.worker_base.WorkerBase"
_MOE = "vllm.model_executor.layers.fused_moe"
_PARALLEL = "vllm.config.ParallelConfig"

PLANNING = (
    Seam(f"{_STATE}.add_model"),
    Seam(f"{_STATE}.model_states"),
    Seam(f"{_STATE}.policy"),
    Seam(f"{_STATE}.is_async"),
    Seam(f"{_STATE}.step", ("is_dummy", "is_profile")),
    Seam(f"{_STATE}.rearrange", ("is_profile", "rank_mapping")),
    Seam(f"{_STATE}.expert_load_window_step"),
    Seam(f"{_STATE}.expert_rearrangement_step"),
    Seam(f"{_STATE}.expert_rearrangement_step_interval"),
    *(
        Seam(f"{_MODEL_STATE}.{name}")
        for name in ("expert_load_window", "model", "model_name", "physical_to_logical_map", "rebalanced")
    ),
    *(
        Seam(f"{_MODEL}.{name}")
        for name in (
            "expert_weights",
            "moe_layers",
            "num_expert_groups",
            "num_local_physical_experts",
            "num_logical_experts",
            "num_moe_layers",
            "num_physical_experts",
        )
    ),
    Seam(
        f"{_EPLB}.policy.AbstractEplbPolicy.rebalance_experts",
        (
            "weight",
            "num_replicas",
            "num_groups",
            "num_nodes",
            "num_ranks",
            "old_global_expert_indices",
        ),
        exactly=True,
    ),
    Seam(f"{_MOE}.config.FusedMoEConfig.experts_per_token"),
    Seam("vllm.distributed.parallel_state.get_ep_group"),
    Seam("vllm.distributed.parallel_state.get_eplb_group"),
    Seam("vllm.distributed.parallel_state.get_pp_group"),
    Seam("vllm.distributed.parallel_state.GroupCoordinator.cpu_group"),
    Seam("vllm.distributed.parallel_state.GroupCoordinator.device_group"),
    Seam("vllm.distributed.parallel_state.GroupCoordinator.is_last_rank"),
    Seam("vllm.distributed.parallel_state.GroupCoordinator.rank_in_group"),
    Seam("vllm.distributed.parallel_state.GroupCoordinator.ranks"),
    Seam("vllm.distributed.parallel_state.GroupCoordinator.world_size"),
)
"""Without one of these, vLLM's own policy plans."""

CHECKING = (
    Seam("vllm.config.get_current_vllm_config_or_none"),
    Seam(f"{_WORKER}.__init__"),
    Seam(f"{_WORKER}.get_model"),
    Seam(f"{_WORKER}.load_model"),
    Seam(f"{_WORKER}.rank"),
    Seam(f"{_WORKER}.vllm_config"),
    Seam("vllm.config.ModelConfig.get_num_experts"),
    Seam("vllm.config.ModelConfig.runner_type"),
    Seam("vllm.config.VllmConfig.additional_config"),
    Seam("vllm.config.VllmConfig.use_v2_model_runner"),
    Seam("vllm.model_executor.models.interfaces.get_mixture_of_experts_model", ("model",)),
    *(
        Seam(f"{_PARALLEL}.{name}")
        for name in (
            "data_parallel_size",
            "distributed_executor_backend",
            "enable_eplb",
            "eplb_config",
            "pipeline_parallel_size",
            "prefill_context_parallel_size",
        )
    ),
    Seam("vllm.config.parallel.EPLBConfig.num_redundant_experts"),
)
"""What the options and the warnings at load need."""

DISPATCH = (
    Seam(
        f"{_MOE}.router.base_router.eplb_map_to_physical_and_record",
        (
            "topk_ids",
            "expert_load_view",
            "logical_to_physical_map",
            "logical_replica_count",
            "record_enabled",
            "num_unpadded_tokens",
        ),
        exactly=True,
    ),
    Seam(f"{_STATE}.parallel_config"),
    Seam(f"{_MODEL_STATE}.logical_to_physical_map"),
    *(Seam(f"{_PARALLEL}.{name}") for name in ("enable_elastic_ep", "tensor_parallel_size", "use_ubatching")),
    *(
        Seam(f"{_MOE}.config.FusedMoEConfig.{name}")
        for name in ("dp_size", "is_sequence_parallel", "pcp_size")
    ),
    *(
        Seam(f"{_MOE}.runner.moe_runner.MoERunner.{name}")
        for name in ("do_naive_dispatch_combine", "is_monolithic", "layer_name", "moe_config")
    ),
    Seam("vllm.distributed.parallel_state.GroupCoordinator.all_gather", ("input_", "dim")),
)
"""Without one of these, vLLM's own mapping from experts to slots goes on."""

SEAMS = (*PLANNING, *CHECKING, *DISPATCH)
