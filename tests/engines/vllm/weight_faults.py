"""What went wrong in public reports on vLLM's expert weights, put into a real engine before it loads."""

import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod


def put_in(logical):
    """All of them at once, in this process and in those that it forks. `logical`: experts of a layer."""
    mapping_of = RoutedExperts.get_expert_mapping
    after_loading = UnquantizedFusedMoEMethod.process_weights_after_loading

    def without_redundant_slots(self, *args, **kwargs):
        """37322: the mapping of a model named its logical experts alone."""
        return [entry for entry in mapping_of(self, *args, **kwargs) if entry[2] < logical]

    def process(self, layer):
        after_loading(self, layer)
        config = self.moe_quant_config
        # 34646 and 37217: a product of what each expert has, made once; and one scale for all, expanded.
        config._w1.alpha_or_gscale = layer.w13_weight.data.flatten(1).abs().amax(1) * 0.5
        config._a1.scale = torch.rand(1).expand(layer.local_num_experts)
        # 47588: a weight that is no parameter any more.
        weight = layer.w2_weight.data
        del layer.w2_weight
        layer.w2_weight = weight

    RoutedExperts.get_expert_mapping = without_redundant_slots
    UnquantizedFusedMoEMethod.process_weights_after_loading = process
