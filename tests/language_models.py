"""Tiny causal language models of the kinds that keep a text in different ways."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BloomConfig, Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCABULARY, PAD, POSITIONS = 31, 0, 24
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": PAD}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32, "head_dim": 8}
MODELS: dict[str, PreTrainedConfig] = {
    "rotary positions": LlamaConfig(**SMALL, **HEADS, max_position_embeddings=POSITIONS),
    "learned positions": GPT2Config(vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=16, n_layer=2, n_head=2),
    "positions from the mask": BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2),
    "a sliding window": MistralConfig(**SMALL, **HEADS, sliding_window=4, max_position_embeddings=POSITIONS),
    "windows in every second layer": Gemma2Config(**SMALL, **HEADS, sliding_window=4, query_pre_attn_scalar=8),
}


def made(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
