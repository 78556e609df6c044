"""Tiny mixtures of experts, of kinds that transformers writes and lays out in different ways."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GptOssConfig,
    JambaConfig,
    MixtralConfig,
    NemotronHConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTURES: dict[str, PreTrainedConfig] = {
    "mixtral": MixtralConfig(**SMALL, num_hidden_layers=2, intermediate_size=24, num_local_experts=4),
    "qwen3 moe": Qwen3MoeConfig(
        **SMALL, num_hidden_layers=2, intermediate_size=32, moe_intermediate_size=8, num_experts=5, head_dim=8
    ),
    "gpt-oss": GptOssConfig(
        **SMALL, num_hidden_layers=2, intermediate_size=16, num_local_experts=4, head_dim=8, sliding_window=4
    ),
    # with Mamba blocks between those of attention
    "jamba": JambaConfig(
        **SMALL,
        num_hidden_layers=2,
        intermediate_size=24,
        num_experts=4,
        expert_layer_period=2,
        expert_layer_offset=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
    ),
    # whose experts have no gate
    "nemotron": NemotronHConfig(
        **SMALL,
        layers_block_type=["moe", "attention"],
        intermediate_size=24,
        moe_intermediate_size=24,
        n_routed_experts=4,
        mamba_num_heads=4,
        mamba_head_dim=8,
        moe_shared_expert_intermediate_size=8,
    ),
}


PRODUCTS = {kind: ["experts.gate_up_proj", "experts.down_proj"] for kind in MIXTURES}
PRODUCTS["nemotron"] = ["experts.up_proj", "experts.down_proj"]
"""The fused parameters of each, as target_parameters names them."""


def mixture(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = MIXTURES[kind]
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).to(dtype).eval()
