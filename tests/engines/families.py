"""Tiny random models of the families that engines balance, and the greedy tokens that transformers gives."""

from pathlib import Path

import torch

from .vllm.prompts import NEW_TOKENS, PROMPTS

EXPERTS = 16
_SHARED = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "dtype": "float32",
}
_GROUPED = {"n_routed_experts": EXPERTS, "n_group": 4, "topk_group": 2, "norm_topk_prob": True}

# Name: class of transformers, its options beside the shared ones, and its MoE layers.
FAMILIES = {
    "GLM-4-MoE": (
        "Glm4Moe",
        {
            **_GROUPED,
            "num_hidden_layers": 4,
            "head_dim": 32,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
        },
        3,
    ),
    "Mixtral": ("Mixtral", {"num_hidden_layers": 3, "num_local_experts": EXPERTS, "head_dim": 32}, 3),
    "Ernie-4.5-MoE": (
        "Ernie4_5_Moe",
        {
            "num_hidden_layers": 4,
            "moe_num_experts": EXPERTS,
            "moe_k": 4,
            "moe_intermediate_size": 64,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 3,
            "moe_layer_interval": 1,
        },
        3,
    ),
    "DeepSeek-V3": (
        "DeepseekV3",
        {
            **_GROUPED,
            "num_hidden_layers": 4,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "q_lora_rank": None,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
        },
        3,
    ),
    "LFM2-MoE": (
        "Lfm2Moe",
        {
            "num_hidden_layers": 4,
            "num_dense_layers": 1,
            "num_experts": EXPERTS,
            "moe_intermediate_size": 64,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        },
        3,
    ),
}


def save_family(name: str, folder: Path) -> list[list[int]]:
    """Save the tiny model of a family, and give the tokens that follow each prompt."""
    import transformers

    kind, options, _ = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**_SHARED, **options})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for part, weight in model.named_parameters():
            if part.endswith("gate.weight") and not weight.any():  # transformers leaves Ernie's at zero
                torch.nn.init.normal_(weight, std=_SHARED["initializer_range"])
    model.save_pretrained(folder)
    prompts = torch.tensor(PROMPTS)
    decoded = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    tokens: list[list[int]] = decoded[:, prompts.shape[1] :].tolist()
    return tokens
