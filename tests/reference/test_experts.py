"""Fused experts of every method against its paper's equation: token by token, expert by expert, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from mixtures import MIXTURES, mixture
from peft import get_peft_model
from torch import Tensor, nn

from multiflora import ops
from multiflora.context import find
from multiflora.methods import METHODS, build_config

from . import oracles
from .test_oracle import CASES

REFUSED = ("loraga", "deltalora")
ROWS = [(name, settings) for name in sorted(CASES) if name not in REFUSED for settings in CASES[name]]
TASKS = torch.tensor([2, 0, 1])
LENGTH, TOP = 5, 2


class Net(nn.Module):
    """The experts of a mixture without the router: who serves which token is given."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.experts = next(module for name, module in mixture(kind).named_modules() if name.endswith(".experts"))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x.reshape(-1, x.shape[-1]), chosen, weights).view(x.shape)


def adapted(kind: str, name: str, settings: dict[str, Any], **more: Any) -> tuple[Any, Any]:
    torch.manual_seed(3)
    words = {"r": 2, "lora_alpha": 3, "lora_dropout": 0.0, "num_tasks": 3, "target_modules": []} | settings | more
    if name in ("rlora", "mlora"):
        words = {"head_dropout": 0.0} | words
    if METHODS[name].settings and name in ("loramoe", "alignlora"):
        words |= {"balance_weight": 0.0} if name == "loramoe" else {"align_weight": 0.0}
    net = Net(kind).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0.0, 0.5)
    own = [f"experts.{product}" for product in products(net.experts)]
    model = get_peft_model(net, build_config(name, words | {"target_parameters": own}), autocast_adapter_dtype=False)
    for parameter in model.parameters():  # away from the start: nothing is zero, nothing is equal
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, dtype=parameter.dtype))
    return model, model.base_model.model.experts


def products(experts: Any) -> list[str]:
    return ["gate_up_proj" if hasattr(experts, "gate_up_proj") else "up_proj", "down_proj"]


def activated(kind: str, h: Tensor) -> Tensor:
    """What stands between an expert's two matrices, as the model's paper has it."""
    if kind == "nemotron":
        return torch.relu(h) ** 2
    if kind == "gpt-oss":  # gates and values alternate, and are cut off at 7
        gate, up = h[::2].clamp(max=7.0), h[1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = h[: len(h) // 2], h[len(h) // 2 :]
    return torch.nn.functional.silu(gate) * up


def matrix(kind: str, experts: Any, name: str, e: int) -> Tensor:
    weight = getattr(experts, name)[e]
    return weight.t() if kind == "gpt-oss" else weight


def product(kind: str, layer: Any, experts: Any, name: str, e: int, task: int, x: Tensor, drop: Tensor, m: Tensor):
    """One token times the matrix of one expert, and the paper's sum with that expert's tensors."""
    config, method = layer.configs["default"], layer.method
    shared = method.of(config).shared(config)
    parts = {part: t if part in shared else t[e] for part, t in layer.parts("default").items()}
    rank = layer.method_of("default").rank(config, config.r)
    s = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    y = matrix(kind, experts, name, e) @ x
    if kind == "gpt-oss":
        y = y + getattr(experts, f"{name}_bias")[e]
    return y + getattr(oracles, config.method_name)(parts, x, drop, task, s, rank, m, config)


def expected(kind: str, wrapper: Any, x: Tensor, chosen: Tensor, weights: Tensor, seeds: list[dict[str, int]]):
    """The experts' answers, one token and one expert after another."""
    experts, layers = wrapper.base_layer, wrapper.layers()
    pairs = sorted((int(e), t, k) for t, row in enumerate(chosen) for k, e in enumerate(row))
    first, second = products(experts)
    masks = [dropped(layers[name], len(pairs), seed) for name, seed in zip((first, second), seeds, strict=True)]
    flat, rows = x.reshape(-1, x.shape[-1]), [torch.zeros(x.shape[-1], dtype=x.dtype) for _ in chosen]
    for place, (e, t, k) in enumerate(pairs):
        task = int(TASKS[t // LENGTH])
        (mask, heads), token = masks[0], flat[t]
        h = product(kind, layers[first], experts, first, e, task, token, token * mask[place], heads[place])
        h = activated(kind, h)
        (mask, heads) = masks[1]
        y = product(kind, layers[second], experts, second, e, task, h, h * mask[place], heads[place])
        rows[t] = rows[t] + weights[t, k] * (experts.post_expert_norm(y) if experts.has_post_expert_norm else y)
    return torch.stack(rows).view(x.shape)


def dropped(layer: Any, count: int, seed: dict[str, int]) -> tuple[Tensor, Tensor]:
    """The masks of each pair: on what the stems read, and on each head's input."""
    config, method = layer.configs["default"], layer.method_of("default")
    heads, rank = method.heads(config), method.rank(config, config.r)
    stems, own = torch.ones(count, layer.in_features, dtype=torch.float64), torch.ones(count, heads, rank).double()
    if "input" in seed:
        stems = ops.dropout_mask(tuple(stems.shape), config.lora_dropout, seed["input"], dtype=stems.dtype)
    if "heads" in seed:
        own = ops.head_mask(count, heads, rank, config.head_dropout, seed["heads"], dtype=own.dtype).permute(2, 0, 1)
    return stems, own


def inputs(experts: Any, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the experts of each (the last one never, the first one often), and their weights."""
    torch.manual_seed(5)
    x = torch.randn(3, LENGTH, 16, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(3 * LENGTH, num_experts)
    scores[:, 0] += 1
    scores[:, -1] = -torch.inf
    weights = torch.rand(3 * LENGTH, TOP, dtype=torch.float64).requires_grad_()
    return x, scores.topk(TOP).indices, weights


def agree(kind: str, model: Any, wrapper: Any, seeds: list[dict[str, int]], seed: int | None = None) -> None:
    x, chosen, weights = inputs(wrapper.base_layer, wrapper.base_layer.num_experts)
    if seed is not None:
        torch.manual_seed(seed)
    ours = model(x, chosen, weights, task_id=TASKS)
    theirs = expected(kind, wrapper, x, chosen, weights, seeds)
    assert (ours - theirs).abs().max() < 1e-9
    wanted = [x, weights, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    assert len(wanted) >= 2 + 2 * 2
    torch.manual_seed(9)
    direction = torch.randn_like(ours)
    grads = [torch.autograd.grad((y * direction).sum(), wanted, allow_unused=True) for y in (ours, theirs)]
    for ours_grad, theirs_grad in zip(*grads, strict=True):
        assert ours_grad is not None
        other = torch.zeros_like(ours_grad) if theirs_grad is None else theirs_grad
        assert (ours_grad - other).abs().max() < 1e-9
    assert all(grad.abs().max() > 0 for grad in grads[0][:4])


@pytest.mark.parametrize("path", ["packed", "loop"])
@pytest.mark.parametrize(("name", "settings"), ROWS, ids=[f"{n}-{'-'.join(map(str, s.values()))}" for n, s in ROWS])
def test_outputs_and_gradients_are_those_of_the_paper(name: str, settings: dict[str, Any], path: str) -> None:
    model, wrapper = adapted("mixtral", name, settings)
    find(model).loop = path == "loop"
    agree("mixtral", model, wrapper, [{}, {}])


@pytest.mark.parametrize("name", ["rlora", "mtllora"])
@pytest.mark.parametrize("kind", [kind for kind in MIXTURES if kind != "mixtral"])
def test_every_layout_of_experts(kind: str, name: str) -> None:
    model, wrapper = adapted(kind, name, {})
    agree(kind, model, wrapper, [{}, {}])


def test_experts_whose_answers_are_normed() -> None:
    model, wrapper = adapted("mixtral", "rlora", {})
    wrapper.base_layer.has_post_expert_norm = True
    wrapper.base_layer.post_expert_norm = nn.LayerNorm(16).double()
    agree("mixtral", model, wrapper, [{}, {}])


@pytest.mark.parametrize("name", [name for name in CASES if name not in REFUSED])
def test_dropout_drops_where_the_paper_says(name: str) -> None:
    own = {"head_dropout": 0.4} if name in ("rlora", "mlora") else {}
    model, wrapper = adapted("mixtral", name, CASES[name][0], lora_dropout=0.3, **own)
    model.train()
    torch.manual_seed(6)
    seeds = [{"input": ops.draw_seed()} | ({"heads": ops.draw_seed()} if own else {}) for _ in range(2)]
    agree("mixtral", model, wrapper, seeds, seed=6)
