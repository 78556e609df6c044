"""A feed-forward block with one router against MixLoRA's equations: token by token, expert by expert, in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from multiflora import ops
from multiflora.context import auxiliary_loss, find
from multiflora.methods import build_config

from . import oracles
from .oracles import routed

WIDTH, INNER, RANK, ALPHA = 7, 5, 2, 3
LAYERS = ("gate_proj", "up_proj", "down_proj")
CASES = [
    ("mixlora", {"num_experts": 4, "top_k": 2}),
    ("mixlora", {"num_experts": [4, 3], "top_k": 3}),
    ("loramoe", {"num_experts": 3}),
    ("hydralora", {"num_heads": 4, "top_k": 3}),
    ("rlora", {"num_heads": 3, "head_dropout": 0.0}),
    ("parts", {"num_heads": 3, "stem": "own", "gate": "token", "top_k": 2}),
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.down_proj = nn.Linear(INNER, WIDTH)

    def forward(self, x):
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Net(nn.Module):
    def __init__(self, recompute: bool | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": Block()}) for _ in range(2))
        self.recompute = recompute

    def forward(self, x):
        for layer in self.layers:
            x = x + (
                layer["mlp"](x) if self.recompute is None else checkpoint(layer["mlp"], x, use_reentrant=self.recompute)
            )
        return x


def adapted(name, settings, recompute=None, **more):
    torch.manual_seed(3)
    words = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": list(LAYERS), "router_per": "block"}
    config = build_config(name, words | settings | more)
    model = get_peft_model(Net(recompute).double(), config, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.4 * torch.randn(parameter.shape, dtype=parameter.dtype))
    return model.train(), [p for p in model.parameters() if p.requires_grad]


def one_layer(layer, gate, x, xd, shared_stem):
    """W x + s Σ_e g_e B_e A_e x, and R-LoRA's offset where there is one."""
    parts, s = layer.parts("default"), ALPHA / RANK
    y = layer.base_layer.weight @ x + layer.base_layer.bias
    for e, weight in enumerate(gate):
        A = parts["A"] if shared_stem else oracles.stem(parts, e, RANK)
        y = y + s * weight * (oracles.head(parts, e, RANK) @ (A @ xd))
    return y - s * (parts["B0"] @ (parts["A0"] @ x)) if "A0" in parts else y


def expected(model, name, settings, x, drop=None):
    """The two blocks, and the load-balance loss of each: E Σ_e F_e P_e over its one router's choices."""
    values = []
    for number, layer in enumerate(model.base_model.model.layers):
        mlp, shared = layer["mlp"], name in ("hydralora", "rlora")
        router = mlp.gate_proj.parts("default")["router"]
        heads, rows, shares, dense = len(router), [], 0, 0
        k = settings.get("top_k") if heads > settings.get("top_k", 0) else None
        for token, h in enumerate(x.reshape(-1, WIDTH)):
            gate = routed(router @ h, k)
            masks = [1.0, 1.0, 1.0] if drop is None else [mask[token] for mask in drop[number]]
            a = one_layer(mlp.gate_proj, gate, h, h * masks[0], shared)
            b = one_layer(mlp.up_proj, gate, h, h * masks[1], shared)
            inner = silu(a) * b
            rows.append(h + one_layer(mlp.down_proj, gate, inner, inner * masks[2], shared))
            shares = shares + (gate.detach() > 0).to(x.dtype) / int((gate > 0).sum())
            dense = dense + torch.softmax(router @ h, 0)
        tokens = len(rows)
        if k is not None:
            values.append(heads * ((shares / tokens) * (dense / tokens)).sum())
        x = torch.stack(rows).view_as(x)
    return x, sum(values) / len(values) if values else None


def agree(y, reference, inputs, pull, more=None, other=None):
    assert (y - reference).abs().max() < 1e-10
    ours, theirs = gradients(y, inputs, pull, more), gradients(reference, inputs, pull, other)
    for one, two in zip(ours, theirs, strict=True):
        assert one is not None
        assert (one - (torch.zeros_like(one) if two is None else two)).abs().max() < 1e-10


def gradients(y, inputs, pull, more):
    """By a whole backward pass: re-entrant checkpoints know no other."""
    for one in inputs:
        one.grad = None
    ((y * pull).sum() + (0 if more is None else more)).backward()
    return [None if one.grad is None else one.grad.clone() for one in inputs]


@pytest.mark.parametrize("path", ["fused", "beside", "loop", "checkpoint", "re-entrant"])
@pytest.mark.parametrize(("name", "settings"), CASES, ids=[f"{n}-{'-'.join(map(str, s.values()))}" for n, s in CASES])
def test_outputs_and_gradients_of_the_blocks(name, settings, path):
    model, trained = adapted(name, settings, {"checkpoint": False, "re-entrant": True}.get(path))
    assert sum(".mf_" in key and "_router." in key for key, _ in model.named_parameters()) == 2
    if path == "beside":
        for layer in model.base_model.model.layers:
            layer["mlp"].up_proj.base_layer.register_forward_hook(lambda *_: None)
    find(model).loop = path == "loop"
    x = torch.randn(2, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    y, pull = model(x), torch.randn(2, 4, WIDTH, dtype=torch.float64)
    reference, _ = expected(model, name, settings, x)
    agree(y, reference, [x, *trained], pull)


@pytest.mark.parametrize("path", ["packed", "loop", "checkpoint"])
@pytest.mark.parametrize(("name", "settings"), [case for case in CASES if "top_k" in case[1]][:3])
def test_the_balance_loss_counts_a_block_once(name, settings, path):
    weight = 0.7
    model, trained = adapted(name, settings, False if path == "checkpoint" else None, router_balance_loss=weight)
    find(model).loop = path == "loop"
    x = torch.randn(2, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    y, pull = model(x), torch.randn(2, 4, WIDTH, dtype=torch.float64)
    loss = auxiliary_loss(model)
    reference, value = expected(model, name, settings, x)
    assert math.isclose(float(loss), weight * float(value), rel_tol=1e-12)
    agree(y, reference, [x, *trained], pull, loss, weight * value)


def test_dropout_is_each_layer_s_own_and_the_router_s_input_is_whole(monkeypatch):
    model, trained = adapted("mixlora", {"num_experts": 4, "top_k": 2}, lora_dropout=0.4)
    seeds = iter(range(100))
    monkeypatch.setattr(ops, "draw_seed", lambda: next(seeds))
    x = torch.randn(2, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    y = model(x)
    masks, seed = [], 0
    for _ in range(2):
        own = []
        for width in (WIDTH, WIDTH, INNER):
            own.append(ops.dropout_mask((8, width), 0.4, seed, dtype=x.dtype))
            seed += 1
        masks.append(own)
    reference, _ = expected(model, "mixlora", {"num_experts": 4, "top_k": 2}, x, masks)
    agree(y, reference, [x, *trained], torch.randn(2, 4, WIDTH, dtype=torch.float64))


@pytest.mark.parametrize(("name", "settings"), CASES, ids=[f"{n}-{'-'.join(map(str, s.values()))}" for n, s in CASES])
def test_prepared_for_inference(name, settings):
    model, _ = adapted(name, settings)
    x = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        y = model.eval()(x)
        layer = model.base_model.model.layers[0]["mlp"].down_proj
        assert len(layer._prepared) == 1
        assert (y - expected(model, name, settings, x)[0]).abs().max() < 1e-10
        again = copy.deepcopy(model)(x)
    assert torch.equal(again, y)
