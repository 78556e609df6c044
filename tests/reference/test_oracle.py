"""Outputs and all gradients of every method against its paper's equation, token by token, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from multiflora import ops
from multiflora.context import find
from multiflora.methods import METHODS, build_config

from . import oracles

OURS = sorted(name for name, card in METHODS.items() if card.module)
TASKS = torch.tensor([2, 0, 1])
D_IN, D_OUT, LENGTH = 11, 7, 5

# name -> settings; odd sizes, the degenerate ends (one head, rank one) and every switch of the equation
CASES = {
    "multilora": [{"num_modules": 3}, {"num_modules": 1, "scale_shape": "scalar"}, {"use_alpha": False, "r": 1}],
    "rlora": [
        {},
        {"num_heads": 1},
        {"init_weights": "zero", "router_init": "kaiming", "r": 1},
        {"init_weights": "code", "router_init": "kaiming"},
        {"init_weights": "zero", "router_init": "kaiming", "num_heads": 4, "top_k": 2},
    ],
    "mlora": [{}, {"reduce": "sum", "num_heads": 2}, {"init_weights": "zero", "num_heads": 1}],
    "hydralora": [{"num_heads": 4}, {"num_heads": 5, "top_k": 3}, {"num_heads": 1, "use_rslora": True}],
    "moelora": [{"num_experts": 4, "r": 8}, {"num_experts": 1, "r": 2}],
    "loramoe": [{"num_experts": 3}, {"num_experts": 1}, {"num_experts": 4, "top_k": 2}],
    "mixlora": [{}, {"num_experts": 3, "r": 1}],
    "loraga": [{}, {"r": 1}],
    "deltalora": [{}, {"update_ratio": 0.5, "start_step": 3}],
    "parts": [
        {},
        {"stem": "own", "gate": "sum", "num_heads": 2},
        {"stem": "own", "heads": "random", "gate": "mean", "offset": True},
        {"stem": "own", "heads": "random", "gate": "token", "router_init": "zero", "offset": True, "num_heads": 2},
        {"stem": "shared", "heads": "random", "gate": "scale", "scale_shape": "scalar"},
        {"stem": "own", "gate": "token", "num_heads": 4, "top_k": 3},
        {"stem": "own", "gate": "task", "temperature": 1.0},
        {"stem": "shared", "gate": "task_embedding", "task_matrix": "diagonal", "task_embedding_dim": 3},
        {"stem": "shared", "gate": "token", "task_matrix": "full", "r": 1},
        {"gate": "stem", "r": 4},
        {"gate": "stem", "num_heads": 4, "top_k": 2, "task_matrix": "full", "router_scores": "sigmoid"},
        {"gate": "token", "stem": "own", "router_scores": "sigmoid"},
        {"gate": "largest", "stem": "own", "num_heads": 5, "top_k": 2, "r": 1},
        {"gate": "largest", "stem": "own", "num_heads": 3, "top_k": 2, "r": 2},
        {"core": "full", "gate": "sum", "num_heads": 1, "r": 3},
        {"core": "diagonal", "gate": "task", "num_cores": 2, "num_heads": 2},
        {"core": "full", "gate": "token", "r": 1},
        {"core": "full", "heads": "random", "gate": "mean", "offset": True},
        {"stem": "blended", "gate": "stem", "num_stems": 4},
        {"stem": "blended", "gate": "sum", "num_stems": 2, "num_heads": 1, "r": 1},
    ],
    "alignlora": [{}, {"r": 1, "use_rslora": True}],
    "mtllora": [{}, {"task_matrix": "diagonal", "r": 1}, {"num_heads": 1}],
}
ROWS = [(name, settings) for name in OURS for settings in CASES[name]]


class Net(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.lin = nn.Linear(D_IN, D_OUT, bias=bias)

    def forward(self, x):
        return self.lin(x)


def adapted(name: str, settings: dict, **more):
    from peft import get_peft_model

    torch.manual_seed(3)
    words = {"r": 2, "lora_alpha": 3, "lora_dropout": 0.0, "num_tasks": 3, "target_modules": ["lin"]} | settings | more
    if name in ("rlora", "mlora"):
        words = {"head_dropout": 0.0} | words
    config = build_config(name, words)
    model = get_peft_model(Net().double(), config, autocast_adapter_dtype=False)
    layer = model.base_model.model.lin
    for part in layer.parts("default").values():  # away from the start: nothing is zero, nothing is equal
        part.data.add_(0.3 * torch.randn(part.shape, dtype=part.dtype))
    return model, layer, config


def expected(layer, config, x, seeds):
    """The base layer plus the paper's sum, one token after another."""
    parts = layer.parts("default")
    r = layer.method.rank(config, config.r)
    s = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    heads = layer.method.heads(config)
    flat = x.reshape(-1, D_IN)
    dropped, masks = flat, torch.ones(len(flat), heads, r, dtype=x.dtype)
    if "input" in seeds:
        dropped = flat * ops.dropout_mask(tuple(flat.shape), config.lora_dropout, seeds["input"], dtype=x.dtype)
    if "heads" in seeds:
        masks = ops.head_mask(len(flat), heads, r, config.head_dropout, seeds["heads"], dtype=x.dtype).permute(2, 0, 1)
    rows = []
    for token, (plain, drop) in enumerate(zip(flat, dropped, strict=True)):
        task = int(TASKS[token // LENGTH])
        update = getattr(oracles, config.method_name)(parts, plain, drop, task, s, r, masks[token], config)
        base = layer.base_layer
        rows.append(base.weight @ plain + base.bias + update)
    return torch.stack(rows).reshape(*x.shape[:-1], D_OUT)


def gradients(layer, x, y):
    """Those of x and of everything trained, under a fixed random loss."""
    torch.manual_seed(9)
    wanted = {"x": x} | {name: part for name, part in layer.parts("default").items() if part.requires_grad}
    grads = torch.autograd.grad((y * torch.randn_like(y)).sum(), list(wanted.values()), allow_unused=True)
    return dict(zip(wanted, grads, strict=True))


def agree(layer, config, x, y, seeds):
    reference = expected(layer, config, x, seeds)
    assert (y - reference).abs().max() < 1e-10
    ours, theirs = gradients(layer, x, y), gradients(layer, x, reference)
    assert set(ours) >= {"x", "A", "B"}
    for name, grad in ours.items():
        other = torch.zeros_like(grad) if theirs[name] is None else theirs[name]
        assert (grad - other).abs().max() < 1e-10, name


@pytest.mark.parametrize("path", ["fused", "beside", "loop"])
@pytest.mark.parametrize(("name", "settings"), ROWS, ids=[f"{n}-{'-'.join(map(str, s.values()))}" for n, s in ROWS])
def test_outputs_and_gradients_are_those_of_the_paper(name, settings, path):
    model, layer, config = adapted(name, settings)
    if path == "beside":  # as on quantised layers: the base output is made elsewhere
        layer.base_layer.register_forward_hook(lambda *_: None)
    find(model).loop = path == "loop"
    x = torch.randn(3, LENGTH, D_IN, dtype=torch.float64, requires_grad=True)
    y = model(x, task_id=TASKS)
    agree(layer, config, x, y, {})


@pytest.mark.parametrize("path", ["fused", "beside", "loop"])
@pytest.mark.parametrize("name", OURS)
def test_dropout_drops_where_the_paper_says(name, path):
    own = {"head_dropout": 0.4} if name in ("rlora", "mlora") else {}
    model, layer, config = adapted(name, CASES[name][0], lora_dropout=0.3, **own)
    if path == "beside":
        layer.base_layer.register_forward_hook(lambda *_: None)
    find(model).loop = path == "loop"
    model.train()
    x = torch.randn(3, LENGTH, D_IN, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    seeds = {"input": ops.draw_seed()} | ({"heads": ops.draw_seed()} if own else {})
    torch.manual_seed(5)
    y = model(x, task_id=TASKS)
    agree(layer, config, x, y, seeds)
