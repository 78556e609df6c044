"""Every method reduced to one head and no gate *is* LoRA: peft's layer with the same weights, values and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from multiflora.methods import build_config

ONE_HEAD = {
    "multilora": {"num_modules": 1, "scale_shape": "scalar"},
    "rlora": {"num_heads": 1, "init_weights": "zero", "head_dropout": 0.0},
    "mlora": {"num_heads": 1, "init_weights": "zero", "head_dropout": 0.0},
    "hydralora": {"num_heads": 1},
    "moelora": {"num_experts": 1, "num_tasks": 1},
    "loramoe": {"num_experts": 1},
    "mtllora": {"num_heads": 1, "num_tasks": 1},
    "mixlora": {"num_experts": 1, "top_k": None, "router_balance_loss": 0.0},
    "alignlora": {"num_tasks": 1},
    "loraga": {},
    "parts": {"num_heads": 1},
}


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("name", sorted(ONE_HEAD))
def test_one_head_is_peft_lora(name, use_rslora):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(40, 64), nn.SiLU(), nn.Linear(64, 24))
    words = {"r": 6, "lora_alpha": 9, "lora_dropout": 0.0, "use_rslora": use_rslora, "target_modules": ["0", "2"]}
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(**words))
    ours = get_peft_model(copy.deepcopy(base), build_config(name, words | ONE_HEAD[name]))
    for index in (0, 2):
        lora, parts = theirs.base_model.model[index], ours.base_model.model[index].parts("default")
        nn.init.normal_(lora.lora_B["default"].weight)
        parts["A"].data.copy_(lora.lora_A["default"].weight)
        parts["B"].data.copy_(lora.lora_B["default"].weight)
        if "scale" in parts:
            parts["scale"].data.fill_(1.0)
    x = torch.randn(5, 7, 40)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [model(value) for model, value in zip((theirs, ours), inputs, strict=True)]

    def same(ours, theirs):
        return (ours - theirs).norm() < 1e-6 * theirs.norm()

    assert same(outputs[1], outputs[0])
    for output in outputs:
        output.square().mean().backward()
    assert same(inputs[1].grad, inputs[0].grad)
    for index in (0, 2):
        lora, parts = theirs.base_model.model[index], ours.base_model.model[index].parts("default")
        assert same(parts["A"].grad, lora.lora_A["default"].weight.grad)
        assert same(parts["B"].grad, lora.lora_B["default"].weight.grad)
