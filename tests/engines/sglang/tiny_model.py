"""A tiny Qwen3-MoE with random weights, and the greedy tokens that transformers gives for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

LAYERS = 3
EXPERTS = 16
VOCABULARY = 512
NEW_TOKENS = 24
PROMPTS = 8


@dataclass(frozen=True)
class TinyModel:
    """A saved model with prompts and the tokens that have to follow each of them."""

    path: Path
    prompts: list[list[int]]
    tokens: list[list[int]]


def make_model(path: Path) -> TinyModel:
    """Save the model and decode `PROMPTS` prompts that leave no doubt: the best token leads by a clear margin
    at each position, so that another order of sums cannot change it."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=4,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        initializer_range=0.2,
    )
    model = Qwen3MoeForCausalLM(config).float().eval()
    model.save_pretrained(path)
    generator = torch.Generator().manual_seed(1)
    prompts: list[list[int]] = []
    tokens: list[list[int]] = []
    while len(prompts) < PROMPTS:
        length = 3 + len(prompts) % 5
        prompt = torch.randint(VOCABULARY, (1, length), generator=generator)
        decoded = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.stack(decoded.logits).topk(2).values
        if float((best[..., 0] - best[..., 1]).min()) > 0.02:
            prompts.append(prompt[0].tolist())
            tokens.append(decoded.sequences[0, length:].tolist())
    return TinyModel(path, prompts, tokens)
