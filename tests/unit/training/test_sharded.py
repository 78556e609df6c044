"""The adapter's tensors are found by name, all of them and nothing of the base model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import LlamaForCausalLM

from multiflora.methods import build_config
from multiflora.training.sharded import adapter_tensors


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
        build_config("rlora", {"r": 2, "num_heads": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}),
    ],
    ids=["lora with a whole head", "rlora with frozen offsets"],
)
def test_nothing_is_missing_and_nothing_of_the_base_is_there(
    tiny_llama: Callable[..., LlamaForCausalLM], config: object
) -> None:
    model = get_peft_model(tiny_llama(), config)
    found = adapter_tensors(model)
    assert not any("base_layer" in name or "embed_tokens" in name for name in found)
    expected = get_peft_model_state_dict(model)
    saved = get_peft_model_state_dict(model, state_dict=found)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())


def test_of_a_whole_model_the_buffers_are_there_that_it_saves() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.register_buffer("scratch", torch.ones(1), persistent=False)
    found = adapter_tensors(model)
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
