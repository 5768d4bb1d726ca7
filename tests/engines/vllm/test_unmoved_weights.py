"""Weights that vLLM would not move, in vLLM's own classes: named at load, and no others."""

from types import SimpleNamespace

import pytest
import torch

from eplb_plugin.integration.vllm.startup import check_weights
from eplb_plugin.runtime.control.rank_group import RankGroup


def routed_experts():
    """vLLM's own class with five slots, and the configuration that its quantisation makes of scales."""
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig, FusedMoEQuantDesc
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    module = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(module)
    module.local_num_experts = 5
    module.w13_weight = torch.nn.Parameter(torch.rand(5, 4, 2))
    module.w13_weight_scale = torch.nn.Parameter(torch.rand(5, 2, 4).transpose(1, 2))
    module.w13_input_scale = torch.nn.Parameter(torch.rand(1).expand(5))
    module.register_buffer("_expert_map", torch.arange(5, dtype=torch.int32))
    module.e_score_correction_bias = torch.rand(16)
    config = FusedMoEQuantConfig(*(FusedMoEQuantDesc() for _ in range(4)))
    config._w1.scale, config._a1.scale = module.w13_weight_scale, module.w13_input_scale
    module.quant_method = SimpleNamespace(moe_quant_config=config)
    return module


def unmoved_of(experts):
    """The line of the check, "" for none; vLLM itself says what it moves."""
    model = SimpleNamespace(
        moe_layers=[SimpleNamespace(routed_experts=module) for module in experts],
        expert_weights=[list(module.get_expert_weights()) for module in experts],
        num_local_physical_experts=5,
        num_logical_experts=5,
    )
    said = []
    ids = torch.arange(5).repeat(len(experts), 1)
    check_weights(model, ids, lambda: RankGroup(alone=True), lambda *found: said.append(found))
    assert all(cause == "unmoved_tensors" for cause, _ in said)
    return said[0][1] if said else ""


def test_what_vllm_does_not_move_is_told(caplog):
    """vLLM moves the parameters of `RoutedExperts`, but for some names, and nothing else."""
    experts = [routed_experts() for _ in range(3)]
    assert unmoved_of(experts) == ""
    experts[1].w13_input_scale = torch.nn.Parameter(torch.rand(5))
    experts[2].register_buffer("g1_alphas", torch.rand(5))
    assert unmoved_of(experts).endswith(
        "layer 1: w13_input_scale (5,) float32; layer 2: g1_alphas (5,) float32"
    )
    assert caplog.text == ""
    check_weights(SimpleNamespace(moe_layers=None), torch.zeros(1, 5), RankGroup, None)
    assert caplog.text.count("could not be checked; it goes on") == 2


@pytest.mark.parametrize("is_parameter", [False, True])
def test_a_product_of_scales_that_vllm_keeps_is_told_unless_it_is_a_parameter(is_parameter):
    """vllm 34646 and 37217, in vLLM's own code: without the layer, products of scales are made once and kept.
    The inverse of a scale for all experts, expanded with stride 0, is the same in every slot."""
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend, make_fp8_moe_quant_config

    experts = [routed_experts() for _ in range(2)]
    shared = torch.rand(1).expand(5)
    for module in experts:
        module.quant_method.moe_quant_config = make_fp8_moe_quant_config(
            Fp8MoeBackend.FLASHINFER_CUTLASS,
            w1_scale=torch.nn.Parameter(torch.rand(5)),
            w2_scale=torch.nn.Parameter(torch.rand(5)),
            a1_scale=shared,
            a2_scale=shared,
            layer=module if is_parameter else None,
        )
        config = module.quant_method.moe_quant_config
        module.w13_scale, module.w2_scale = config.w1_scale, config.w2_scale
        assert len(config.g1_alphas.unique()) == 5
        assert len(config.a2_gscale.unique()) == 1
    told = unmoved_of(experts)
    kept = [f"quant_method.moe_quant_config._w{n}.alpha_or_gscale (5,) float32" for n in (1, 2)]
    assert told.endswith(f"layers 0-1: {', '.join(kept)}") if not is_parameter else told == ""


def test_weights_that_are_no_parameters_are_told():
    """vllm 47588: what vLLM moves are the scales alone."""
    experts = [routed_experts()]
    weight = experts[0].w13_weight.data
    del experts[0].w13_weight
    experts[0].w13_weight = weight
    assert [tensor.shape for tensor in experts[0].get_expert_weights()] == [(5, 8)]
    assert unmoved_of(experts).endswith("layer 0: w13_weight (5, 4, 2) float32")
