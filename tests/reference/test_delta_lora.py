"""Delta-LoRA against its algorithm run literally: a weight that is written to after every step, in float64."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import multiflora
from multiflora import DeltaLoraConfig


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(6, 5).double()

    def forward(self, x):
        return self.lin(x)


def literally(net, A, B, batches, s, ratio, stay, lr):
    """W, A and B after each step of plain gradient descent, the gradient going to A and B alone."""
    W, A, B = net.lin.weight.detach().clone(), A.clone(), B.clone()
    history = []
    for step, (x, y) in enumerate(batches):
        a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
        out = x @ W.t() + net.lin.bias.detach() + s * (x @ a.t() @ b.t())
        grads = torch.autograd.grad((out - y).square().mean(), (a, b))
        before = B @ A
        A, B = A - lr * grads[0], B - lr * grads[1]
        if step >= stay:
            W = W + ratio * s * (B @ A - before)
        history.append((W.clone(), A.clone(), B.clone()))
    return history


@pytest.mark.parametrize("stay", [0, 2])
def test_the_weight_moves_by_lambda_times_the_change_of_b_a(stay, tmp_path):
    net = Net()
    pristine = copy.deepcopy(net)
    torch.manual_seed(1)
    batches = [(torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)) for _ in range(6)]
    ratio, lr = 1.5, 0.2
    config = DeltaLoraConfig(r=2, lora_alpha=3, update_ratio=ratio, start_step=stay, target_modules=["lin"])
    model = get_peft_model(net, config, autocast_adapter_dtype=False).double().train()
    layer = model.base_model.model.lin
    parts = layer.parts("default")
    wanted = literally(pristine, parts["A"].detach(), parts["B"].detach(), batches, 1.5, ratio, stay, lr)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    callbacks = multiflora.training_callbacks(model)
    for step, ((x, y), (W, A, B)) in enumerate(zip(batches, wanted, strict=True), 1):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        for callback in callbacks:
            callback.on_step_end(None, SimpleNamespace(global_step=step), None, model=model)
        parts = layer.parts("default")
        assert (parts["A"] - A).abs().max() < 1e-12
        assert (parts["B"] - B).abs().max() < 1e-12
        eye = torch.eye(6, dtype=torch.float64)
        # what the layer makes of the unit vectors is W_t + s B A
        weight = (layer(eye) - layer.base_layer.bias).t() - 1.5 * B @ A
        assert (weight - W).abs().max() < 1e-12
        moved = not torch.allclose(W, pristine.lin.weight)
        assert moved == (step > stay)
    assert torch.equal(layer.base_layer.weight, pristine.lin.weight)
    x = batches[0][0]
    model.eval()
    kept = model(x)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(pristine), tmp_path, autocast_adapter_dtype=False)
    assert torch.allclose(loaded.double()(x), kept, atol=1e-12)
    assert torch.allclose(model.merge_and_unload()(x), kept, atol=1e-6)


def test_it_is_not_lora_with_a_larger_alpha():
    """The output has (1 + λ) s B A, the gradient of A and B only s of it."""
    net = Net()
    config = DeltaLoraConfig(r=2, lora_alpha=2, update_ratio=2.0, target_modules=["lin"])
    layer = get_peft_model(net, config, autocast_adapter_dtype=False).double().base_model.model.lin
    parts = layer.parts("default")
    torch.manual_seed(2)
    with torch.no_grad():
        parts["B"].normal_()
    x = torch.randn(1, 6, dtype=torch.float64)
    y = layer(x)
    assert torch.allclose(y - net.lin.base_layer(x), 3 * x @ parts["A"].t() @ parts["B"].t())
    y.sum().backward()
    assert torch.allclose(parts["B"].grad, torch.ones(5, 1, dtype=torch.float64) @ (x @ parts["A"].t()))
