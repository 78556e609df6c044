"""How weights start: the papers' formulas within sampling error, and step 0 is the base model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from multiflora import HydraLoraConfig, MixLoraConfig, MLoraConfig, MoeLoraConfig, MultiLoraConfig, RLoraConfig
from multiflora.methods import METHODS, build_config

OURS = sorted(name for name, card in METHODS.items() if card.module)
D_IN, D_OUT = 600, 400


def layer_of(config, d_in: int = D_IN, d_out: int = D_OUT, seed: int = 0):
    from peft import get_peft_model

    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(d_in, d_out))
    config.target_modules = {"0"}
    return get_peft_model(net, config).base_model.model[0]


def close(sample: torch.Tensor, std: float) -> bool:
    """Whether a sample's standard deviation is the formula's, to four standard errors of it."""
    return abs(sample.std().item() / std - 1) < 4 / math.sqrt(2 * sample.numel())


@pytest.mark.parametrize("config", [RLoraConfig(r=8, num_heads=4), MLoraConfig(r=8, num_heads=4)])
def test_paper_start_of_rlora(config):
    parts = layer_of(config).parts("default")
    c = D_OUT**0.25 / math.sqrt(config.gamma)
    assert close(parts["A"], c / math.sqrt(D_IN))
    heads = parts["B"].view(D_OUT, 4, 8).unbind(1)
    for head in heads:
        assert close(head, c / math.sqrt(D_OUT))
    flat = torch.stack([head.flatten() for head in heads])
    cosine = torch.corrcoef(flat) - torch.eye(4)
    assert cosine.abs().max() < 4 / math.sqrt(flat.shape[1])  # independent draws


def test_code_start_of_rlora_is_nested():
    parts = layer_of(RLoraConfig(r=4, num_heads=5, init_weights="code"), 896, 4864).parts("default")
    c = 4**0.25 / 8
    assert close(parts["A"], c**5 / math.sqrt(896))
    stds = [head.std().item() for head in parts["B"].view(4864, 5, 4).unbind(1)]
    for h, head in enumerate(parts["B"].view(4864, 5, 4).unbind(1)):
        assert close(head, c ** (5 - h) / math.sqrt(4864))
    # the figures of the published code at these sizes: heads differ a thousandfold
    assert stds == pytest.approx([2.5e-6, 1.4e-5, 7.9e-5, 4.5e-4, 2.5e-3], rel=0.05)


def test_multilora_is_kaiming_uniform_with_zero_scales():
    parts = layer_of(MultiLoraConfig(r=8, num_modules=3)).parts("default")
    for name, bound in (("A", 1 / math.sqrt(D_IN)), ("B", 1 / math.sqrt(8))):
        assert parts[name].abs().max() <= bound
        assert close(parts[name], bound / math.sqrt(3))
    assert parts["scale"].shape == (3, D_OUT)
    assert not parts["scale"].any()


def test_hydralora_and_moelora_start():
    hydra = layer_of(HydraLoraConfig(r=8)).parts("default")
    assert close(hydra["A"], 1 / math.sqrt(3 * D_IN))
    assert close(hydra["router"], 1 / math.sqrt(3 * D_IN))
    assert not hydra["B"].any()
    moe = layer_of(MoeLoraConfig(r=16, num_experts=8, num_tasks=4)).parts("default")
    assert close(moe["A"], 0.01)
    assert moe["A"].shape == (16, D_IN)
    assert not moe["B"].any()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", OURS)
def test_step_zero_is_the_base_model(name, bias):
    from peft import get_peft_model

    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(48, 80, bias=bias), nn.Tanh(), nn.Linear(80, 24, bias=bias))
    x = torch.randn(6, 9, 48)
    before = base(x)
    model = get_peft_model(base, build_config(name, {"target_modules": "all-linear", "num_tasks": 1})).eval()
    after = model(x)
    assert ((after - before).norm() / before.norm()).item() < 1e-6


def test_multilora_is_the_base_bit_for_bit_in_training_too():
    from peft import get_peft_model

    base = nn.Sequential(nn.Linear(48, 80))
    x = torch.randn(6, 48)
    before = base(x)
    model = get_peft_model(base, MultiLoraConfig(target_modules=["0"], lora_dropout=0.5)).train()
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    parts = model.base_model.model[0].parts("default")
    assert parts["scale"].grad.any()
    assert not parts["A"].grad.any()
    assert not parts["B"].grad.any()


def test_init_seed_decides_alone():
    first = layer_of(RLoraConfig(init_seed=7), seed=1).parts("default")
    second = layer_of(RLoraConfig(init_seed=7), seed=2).parts("default")
    other = layer_of(RLoraConfig(init_seed=8), seed=1).parts("default")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["A"], other["A"])


def test_the_rlora_offset_is_the_mean_head_at_the_start():
    parts = layer_of(RLoraConfig(r=4, num_heads=3)).parts("default")
    assert torch.equal(parts["A0"], parts["A"])
    assert torch.allclose(parts["B0"], parts["B"].view(D_OUT, 3, 4).mean(1))
    assert not parts["A0"].requires_grad


def test_mixlora_starts_as_its_code():
    assert close(layer_of(MixLoraConfig()).parts("default")["router"], 0.02)
    assert MixLoraConfig().router_balance_loss == 0.001


def test_moelora_s_layers_have_one_gate_or_one_each():
    from peft import get_peft_model

    for shared in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
        words = {"r": 4, "num_experts": 2, "num_tasks": 3, "target_modules": ["0", "1"], "shared_gate": shared}
        model = get_peft_model(net, MoeLoraConfig(**words))
        first, second = (layer.parts("default") for layer in model.base_model.model)
        for part in ("task_embedding", "task_router"):
            assert (first[part] is second[part]) == shared
        gates = [name for name, _ in model.named_parameters() if "task_" in name]
        assert len(gates) == (2 if shared else 4)
        assert {name for name in model.state_dict() if "task_" in name} == set(gates)


def test_a_shared_gate_is_saved_once_and_read_back_by_all(tmp_path):
    from peft import PeftModel, get_peft_model

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)).to(torch.bfloat16)

    words = {"r": 4, "num_experts": 2, "num_tasks": 3, "target_modules": ["0", "1"], "init_weights": False}
    model = get_peft_model(net(), MoeLoraConfig(**words)).eval()
    x, tasks = torch.randn(3, 12, dtype=torch.bfloat16), torch.tensor([0, 2, 1])
    model.save_pretrained(tmp_path)
    for low in (False, True):
        again = PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(again(x, task_id=tasks), model(x, task_id=tasks))
    model.add_adapter("two", MoeLoraConfig(**words))
    model.delete_adapter("default")
    assert torch.isfinite(model(x, task_id=tasks)).all()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert copied(x, task_id=tasks).abs().sum() > 0
    assert copied.base_model.model[1].parts("two")["task_router"].abs().sum() > 0
