"""LoRA-GA against its paper in float64: it starts from the gradient, and its first step follows the top directions."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import multiflora
from multiflora import AdapterError, LoraGaConfig, MLoraConfig

R, GAMMA, ALPHA = 2, 16.0, 6


class Net(nn.Module):
    """Two layers and a loss, called as a transformers model is."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(9, 7).double(), nn.Linear(7, 6).double()

    def forward(self, x, labels=None):
        y = self.second(torch.tanh(self.first(x)))
        return SimpleNamespace(y=y, loss=None if labels is None else (y - labels).square().sum())


def batches():
    torch.manual_seed(1)
    double = {"dtype": torch.float64}
    return [{"x": torch.randn(n, 9, **double), "labels": torch.randn(n, 6, **double)} for n in (4, 1, 3)]


def gradients():
    """The whole weights' gradient, by autograd on the plain model."""
    net = Net()
    sum(net(**batch).loss for batch in batches()).backward()
    return {"first": net.first.weight.grad, "second": net.second.weight.grad}


def started(bytes_at_once=1 << 30):
    config = LoraGaConfig(r=R, lora_alpha=ALPHA, gamma=GAMMA, target_modules=["first", "second"])
    model = get_peft_model(Net(), config, autocast_adapter_dtype=False).double()
    multiflora.start_from_gradients(model, batches(), bytes_at_once=bytes_at_once)
    return model


def layers(model):
    return {name: getattr(model.get_base_model(), name) for name in ("first", "second")}


@pytest.mark.parametrize("bytes_at_once", [1 << 30, 1])
def test_the_start_is_the_papers(bytes_at_once):
    model = started(bytes_at_once)
    for name, layer in layers(model).items():
        gradient, parts = gradients()[name].numpy(), layer.parts("default")
        U, _, Vt = np.linalg.svd(gradient)
        c = gradient.shape[0] ** 0.25 / GAMMA**0.5
        A, B = parts["A"].detach().numpy(), parts["B"].detach().numpy()
        for i in range(R):  # singular vectors are known up to their sign
            assert abs(abs(A[i] @ Vt[i]) - c) < 1e-9
            assert abs(abs(B[:, i] @ U[:, R + i]) - c) < 1e-9
        assert np.allclose(A @ A.T, c**2 * np.eye(R), atol=1e-9)
        assert np.allclose(B.T @ B, c**2 * np.eye(R), atol=1e-9)
        assert torch.equal(parts["A0"], parts["A"])
        assert torch.equal(parts["B0"], parts["B"])


def first_step(model, lr=1e-7):
    """How one step of gradient descent on the same batches changes each layer's weight."""
    before = {name: layer.get_delta_weight("default").double() for name, layer in layers(model).items()}
    double = {name: layer.parts("default") for name, layer in layers(model).items() if hasattr(layer, "parts")}
    starts = {name: parts["B"].detach() @ parts["A"].detach() for name, parts in double.items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    sum(model(**batch).loss for batch in batches()).backward()
    torch.optim.SGD(trained, lr=lr).step()
    if not starts:
        return {
            name: layer.get_delta_weight("default").double() - before[name] for name, layer in layers(model).items()
        }
    return {name: parts["B"].detach() @ parts["A"].detach() - starts[name] for name, parts in double.items()}


def best_approximation(gradient, rank):
    U, S, Vt = torch.linalg.svd(gradient, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vt[:rank]


def cosine(a, b):
    return float((a * b).sum() / (a.norm() * b.norm()))


def test_the_first_step_points_along_the_gradients_top_directions():
    changes = first_step(started())
    lora = get_peft_model(
        Net(),
        LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["first", "second"]),
        autocast_adapter_dtype=False,
    ).double()
    plain = first_step(lora)
    for name, change in changes.items():
        gradient = gradients()[name]
        assert cosine(change, -best_approximation(gradient, 2 * R)) > 1 - 1e-6
        # no update of rank 2r is nearer to the gradient; LoRA's own first step, of rank r, is farther
        assert cosine(change, -gradient) > cosine(plain[name], -gradient) + 0.05


def test_the_first_step_is_that_of_the_base_and_it_loads_on_the_pristine_base(tmp_path):
    model = started().eval()
    batch = batches()[0]
    assert torch.allclose(model(**batch).y, Net()(**batch).y, atol=1e-12)
    first_step(model, lr=0.05)
    kept = model.eval()(**batch).y
    assert not torch.allclose(kept, Net()(**batch).y, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(), tmp_path, autocast_adapter_dtype=False).double()
    assert torch.allclose(loaded(**batch).y, kept, atol=1e-12)
    for name, layer in layers(model).items():
        assert torch.equal(layer.base_layer.weight, getattr(Net(), name).weight)


def test_no_more_gradients_are_held_than_asked_for(monkeypatch):
    from multiflora.methods import gradient_pass

    groups = []
    held = gradient_pass.weight_gradients

    def watched(model, layers, batches):
        found = held(model, layers, batches)
        groups.append(sum(4 * gradient.numel() for gradient in found.values()))
        return found

    monkeypatch.setattr(gradient_pass, "weight_gradients", watched)
    started(bytes_at_once=4 * 9 * 7)
    assert groups == [4 * 9 * 7, 4 * 7 * 6]


def test_the_pass_leaves_nothing_behind():
    model = started()
    assert all(p.grad is None for p in model.parameters())
    assert not any(layer._forward_hooks for layer in layers(model).values())
    assert model.training


def test_what_cannot_start_from_a_gradient_is_refused():
    words = {"target_modules": ["first", "second"]}
    other = get_peft_model(Net(), MLoraConfig(**words))
    with pytest.raises(AdapterError, match="takes no start from a gradient: it is mlora"):
        multiflora.start_from_gradients(other, batches())
    large = get_peft_model(Net(), LoraGaConfig(r=4, **words))
    with pytest.raises(AdapterError, match=r"first is 7 x 9 and r is 4; .* Set r to at most 3"):
        multiflora.start_from_gradients(large, batches())
    model = get_peft_model(copy.deepcopy(Net()), LoraGaConfig(r=1, **words), autocast_adapter_dtype=False).double()
    with pytest.raises(AdapterError, match="There is no batch"):
        multiflora.start_from_gradients(model, [])
    with pytest.raises(AdapterError, match="brought no loss"):
        multiflora.start_from_gradients(model, [{"x": batches()[0]["x"]}])
