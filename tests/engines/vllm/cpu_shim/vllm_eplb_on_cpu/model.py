"""A tiny random Qwen3-MoE with a word for each token, saved as vLLM loads it; nothing in it is learnt."""

from pathlib import Path

import torch

LAYERS = 4
EXPERTS = 16
VOCAB = 512


def save_tiny_model(folder, *, favoured=(), pull=3.0, seed=0):
    """Write config, weights and a tokenizer (token 7 is the word `w7`).

    Args:
        folder: where to.
        favoured: experts that the routers of all layers prefer, whatever the token.
        pull: how strongly, in standard deviations of the other experts' logits.
        seed: of all weights.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=EXPERTS,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        max_position_embeddings=512,
        initializer_range=0.08,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(config).float()
    if favoured:
        # All tokens share a direction, and the favoured routers' rows follow it.
        direction = torch.nn.functional.normalize(torch.randn(config.hidden_size), dim=0)
        with torch.no_grad():
            embedding = model.model.embed_tokens.weight
            embedding += direction * embedding.norm(dim=1).mean()
            for layer in model.model.layers:
                rows = layer.mlp.gate.weight
                rows[list(favoured)] += direction * rows.norm(dim=1).mean() * pull / config.hidden_size**0.5
    model.save_pretrained(Path(folder))
    words = Tokenizer(models.WordLevel({f"w{token}": token for token in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"bos_token": "w0", "eos_token": "w1", "pad_token": "w1", "unk_token": "w0"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(Path(folder))
