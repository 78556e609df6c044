"""A loss that reads a layer's tensors: their gradient is that of the plain sum, once, however the model is trained."""

from __future__ import annotations

import pytest
import torch
from mixtures import PRODUCTS, mixture
from peft import get_peft_model
from reference.oracles import alike
from torch.utils.checkpoint import checkpoint

from multiflora import PartsConfig, auxiliary_loss
from multiflora.context import find
from multiflora.methods.layer_pass import BranchLayer

WEIGHT, HEADS, RANK = 0.7, 3, 2
IDS = torch.arange(3, 17).view(2, 7)


def of_layer(A, B, own):
    heads = [B[:, h * RANK : (h + 1) * RANK] for h in range(HEADS)]
    stems = [A[h * RANK : (h + 1) * RANK] for h in range(HEADS)] if own else []
    return alike(heads) + alike(stems) if own else alike(heads)


class Net(torch.nn.Module):
    """Two blocks, which may be computed again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 6), torch.nn.Linear(6, 5)
        self.reentrant = None

    def forward(self, x):
        for layer in (self.first, self.second):
            again = self.reentrant is not None and torch.is_grad_enabled()
            x = checkpoint(layer, x, use_reentrant=self.reentrant) if again else layer(x)
        return x


def adapted(**words):
    torch.manual_seed(0)
    shared = {"num_heads": HEADS, "r": RANK, "target_modules": ["first", "second"], "orthogonality_loss": WEIGHT}
    model = get_peft_model(Net().double(), PartsConfig(**shared, **words), autocast_adapter_dtype=False)
    layers = [module for module in model.modules() if isinstance(module, BranchLayer)]
    for layer in layers:
        for part in layer.parts("default").values():
            part.data.add_(torch.randn(part.shape, dtype=part.dtype))
    return model.train(), layers


def wanted(layers, own):
    """The mean over the layers, and its gradients by plain autograd."""
    parts = [layer.parts("default") for layer in layers]
    value = WEIGHT * torch.stack([of_layer(each["A"], each["B"], own) for each in parts]).mean()
    names = [(i, name) for i, each in enumerate(parts) for name in each]
    grads = torch.autograd.grad(value, [parts[i][name] for i, name in names], allow_unused=True)
    return value, dict(zip(names, grads, strict=True))


def found(layers):
    return {(i, n): part.grad for i, layer in enumerate(layers) for n, part in layer.parts("default").items()}


def same(ours, theirs):
    for name, other in theirs.items():
        mine = ours[name]
        assert mine is None or other is not None or not mine.any(), name
        assert other is None or (mine - other).abs().max() < 1e-12, name


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize(("own", "gate"), [(False, "token"), (True, "token"), (True, "sum"), (False, "task")])
def test_the_gradient_of_weights_is_there_once(own, gate, reentrant, loop):
    model, layers = adapted(stem="own" if own else "shared", gate=gate, num_tasks=2)
    find(model).loop = loop
    model.base_model.model.reentrant = reentrant
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    y = model(x, task_id=torch.tensor([0, 1, 1, 0]))
    value, theirs = wanted(layers, own)
    asked = auxiliary_loss(model)
    assert float(asked.detach()) == pytest.approx(float(value.detach()), rel=1e-12)
    (asked + 0 * y.sum()).backward()
    same(found(layers), theirs)


def test_the_parts_of_a_step_bring_their_share():
    model, layers = adapted(stem="own")
    _, theirs = wanted(layers, own=True)
    for rows in (1, 3):
        model(torch.randn(rows, 6, dtype=torch.float64))
        (auxiliary_loss(model) / 2).backward()
    same(found(layers), theirs)


def test_a_frozen_tensor_gets_none():
    model, layers = adapted(stem="own", frozen=["A"])
    model(torch.randn(3, 6, dtype=torch.float64))
    auxiliary_loss(model).backward()
    assert all(layer.parts("default")["A"].grad is None for layer in layers)
    assert all(layer.parts("default")["B"].grad.any() for layer in layers)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_each_expert_that_was_chosen_brings_its_own(reentrant):
    torch.manual_seed(0)
    config = PartsConfig(
        stem="own", num_heads=HEADS, r=RANK, target_modules=[], target_parameters=list(PRODUCTS["mixtral"]),
        orthogonality_loss=WEIGHT,
    )  # fmt: skip
    model = get_peft_model(mixture("mixtral").double(), config, autocast_adapter_dtype=False)
    layers = [module for module in model.modules() if isinstance(module, BranchLayer)]
    for layer in layers:
        for part in layer.parts("default").values():
            part.data.add_(torch.randn(part.shape, dtype=part.dtype))
    chosen = {}

    def see(layer, args, output):
        chosen[layer.name] = sorted(set(args[1].expert.tolist()))

    for layer in layers:
        layer.register_forward_hook(see)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    loss = model.train()(input_ids=IDS, labels=IDS).loss
    loss.backward()
    whole = {key: grad.clone() for key, grad in found(layers).items()}
    model.zero_grad()
    model.peft_config["default"].orthogonality_loss = 0.0
    model(input_ids=IDS, labels=IDS).loss.backward()
    rest = found(layers)
    values = []
    for layer in layers:
        parts = layer.parts("default")
        each = [of_layer(parts["A"][e], parts["B"][e], own=True) for e in chosen[layer.name]]
        values.append(torch.stack(each).mean())
    names = [key for key in whole if key[1] in ("A", "B")]
    places = [layers[i].parts("default")[name] for i, name in names]
    grads = torch.autograd.grad(WEIGHT * torch.stack(values).mean(), places)
    for key, grad in zip(names, grads, strict=True):
        assert (whole[key] - rest[key] - grad).abs().max() < 1e-12
        assert grad.any()
