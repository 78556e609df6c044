"""Published sums that are choices of parts: the recipes of docs/methods/parts.md against loops over what is printed."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import yaml

from multiflora import auxiliary_loss
from multiflora.context import find

from .oracles import alike
from .test_losses import plain_load_balance
from .test_oracle import D_IN, D_OUT, LENGTH, TASKS, adapted

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "parts.md"


def recipes():
    """Of the page's table: name of the paper -> settings."""
    section = PAGE.read_text("utf-8").partition("## Published sums")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^,|]+), .*`(\{name: parts.*\})` \|$", section, re.M)
    return {name: {k: v for k, v in yaml.safe_load(words).items() if k != "name"} for name, words in rows}


RECIPES = recipes()


def best(scores, k):
    return sorted(range(len(scores)), key=lambda i: -float(scores[i]))[:k]


def smora(p, x, config):
    """α/k · Σ_{i ∈ top-k} k σ_i / Σ_j σ_j · b_i a_iᵀ x"""
    alpha, k = config.lora_alpha, config.top_k
    scores = torch.sigmoid(p["router"] @ x)
    chosen = best(scores, k)
    total = sum(scores[i] for i in chosen)
    return alpha / k * sum(k * scores[i] / total * p["B"][:, i] * (p["A"][i] @ x) for i in chosen)


def flylora(p, x, config):
    """α/r · Σ_{i ∈ top-k |A x|} b_i a_iᵀ x, for the paper's r ranks and α = 2 r"""
    r = len(p["A"])
    hidden = p["A"] @ x
    return 2 * r / r * sum(p["B"][:, i] * hidden[i] for i in best(hidden.detach().abs(), config.top_k))


def comol(p, x, config):
    """s · U_B (Σ_i softmax(W_g x̂)_i M_i) x̂, x̂ = V_Aᵀ x"""
    low = p["A"] @ x
    weights = torch.softmax(p["core_router"] @ low, 0)
    merged = sum(weight * core for weight, core in zip(weights, p["core"], strict=True))
    return config.lora_alpha / config.r * (p["B"] @ (merged @ low))


def d2mora(p, x, config):
    """s · Σ_j softmax(R_2 v)_j B_j v, v = Σ_i softmax(R_1 x)_i A_i x"""
    r = config.r
    first = torch.softmax(p["router"] @ x, 0)
    mid = sum(first[i] * (p["A"][i * r : (i + 1) * r] @ x) for i in range(config.num_stems))
    second = torch.softmax(p["stem_router"] @ mid, 0)
    return (
        config.lora_alpha / r * sum(second[j] * (p["B"][:, j * r : (j + 1) * r] @ mid) for j in range(config.num_heads))
    )


SUMS = {"SMoRA": smora, "FlyLoRA": flylora, "CoMoL": comol, "D²MoRA": d2mora}


def test_the_page_has_a_recipe_for_each():
    assert set(RECIPES) == {*SUMS, "LoRA-Mixer"}


@pytest.mark.parametrize("path", ["fused", "beside", "loop"])
@pytest.mark.parametrize("name", SUMS)
def test_outputs_and_gradients_are_those_of_the_paper(name, path):
    model, layer, config = adapted("parts", {"r": 3, "lora_alpha": 5} | RECIPES[name])
    if path == "beside":  # as on quantised layers: the base output is made elsewhere
        layer.base_layer.register_forward_hook(lambda *_: None)
    find(model).loop = path == "loop"
    x = torch.randn(3, LENGTH, D_IN, dtype=torch.float64, requires_grad=True)
    y = model(x, task_id=TASKS)
    parts, base = layer.parts("default"), layer.base_layer
    rows = [base.weight @ token + base.bias + SUMS[name](parts, token, config) for token in x.reshape(-1, D_IN)]
    plain = torch.stack(rows).view(3, LENGTH, D_OUT)
    assert (y - plain).abs().max() < 1e-10
    wanted = {"x": x} | {part: tensor for part, tensor in parts.items() if tensor.requires_grad}
    direction = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad((out * direction).sum(), list(wanted.values())) for out in (y, plain))
    for part, mine, other in zip(wanted, ours, theirs, strict=True):
        assert (mine - other).abs().max() < 1e-10, part
        assert mine.any(), part
    assert set(parts) - set(wanted) == ({"A"} if name == "FlyLoRA" else set())
    with torch.no_grad():  # and so they are where branches are prepared, if they can be
        assert (model.eval()(x, task_id=TASKS) - plain).abs().max() < 1e-10


def test_flylora_starts_sparse():
    from peft import get_peft_model

    from multiflora import PartsConfig

    torch.manual_seed(0)
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(64, 8)), PartsConfig(**RECIPES["FlyLoRA"], target_modules=["0"])
    )
    parts = model.base_model.model[0].parts("default")
    assert ((parts["A"] != 0).sum(1) == 16).all()  # 8/32 of 64
    assert parts["A"][parts["A"] != 0].std() == pytest.approx(1 / 32, rel=0.15)
    assert not parts["B"].any()
    assert not parts["A"].requires_grad


def test_d2mora_adds_its_loss():
    model, layer, config = adapted("parts", {"r": 3} | RECIPES["D²MoRA"])
    model.train()(torch.randn(2, D_IN, dtype=torch.float64))
    A, B = layer.parts("default")["A"], layer.parts("default")["B"]
    plain = alike([A[3 * i : 3 * i + 3] for i in range(4)]) + alike([B[:, 3 * h : 3 * h + 3] for h in range(3)])
    assert float(auxiliary_loss(model).detach()) == pytest.approx(config.orthogonality_loss * float(plain.detach()))


def test_lora_mixer_adds_its_loss():
    model, layer, config = adapted("parts", RECIPES["LoRA-Mixer"])
    x = torch.randn(9, D_IN, dtype=torch.float64)
    model.train()(x)
    logits = x @ layer.parts("default")["router"].t()
    p = torch.softmax(logits, 1)
    entropy = sum(-float(each) * math.log(float(each)) for row in p for each in row) / len(p)
    balance = float(plain_load_balance(logits, 2, torch.ones(9)).detach())  # N Σ p̄ f̄
    expected = config.router_balance_loss * balance + config.router_entropy_loss * entropy
    assert float(auxiliary_loss(model).detach()) == pytest.approx(expected)
