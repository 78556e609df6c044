"""Router losses against values worked out by hand, and through a model."""

from __future__ import annotations

import math

import pytest
import torch
from peft import get_peft_model
from torch import nn

import multiflora
from multiflora import AdapterError, LoraMoeConfig, RLoraConfig
from multiflora.methods.losses import load_balance, localized_balance, per_row, router_z, squared_variation


def test_squared_variation():
    values = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    assert squared_variation(values).item() == pytest.approx((14 / 3) / 9)
    assert squared_variation(torch.ones(3, 4)).item() == 0
    assert squared_variation(torch.ones(1)).item() == 0


def test_per_row_leaves_padding_out():
    gate = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [9.0, 9.0]])
    keep = torch.tensor([1, 1, 1, 0])
    assert per_row(gate, 2, keep).tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert per_row(gate, 2, None)[1].tolist() == [4.75, 4.75]


def test_localized_balance_is_zero_when_z_is_even():
    # Z = Q ⊙ I is constant: the matching half carries (1 - δ)/(1 + δ) of the other's load
    delta = 0.2
    load = torch.tensor([[1 / 1.2, 1 / 0.8], [1 / 0.8, 1 / 1.2]])
    assert localized_balance(load, torch.tensor([True, False]), delta).item() == pytest.approx(0, abs=1e-6)
    assert localized_balance(load, torch.tensor([False, True]), delta).item() > 0.1


def test_router_z():
    logits = torch.zeros(3, 4)
    assert router_z(logits, None).item() == pytest.approx(math.log(4) ** 2)
    logits[2] = 100.0
    assert router_z(logits, torch.tensor([1, 1, 0])).item() == pytest.approx(math.log(4) ** 2)


def test_few_entries_and_few_tokens_are_counted_as_they_are():
    assert squared_variation(torch.tensor([1.0, 3.0])).item() == pytest.approx(2 / 4)
    assert squared_variation(torch.tensor([1.0, 9.0, 3.0]), torch.tensor([1, 0, 1])).item() == pytest.approx(2 / 4)
    logits = torch.tensor([[2.0, 1.0, 0.0], [5.0, 0.0, 9.0]])
    gate, one, none = torch.tensor([[0.7, 0.3, 0.0], [0.5, 0.0, 0.5]]), torch.tensor([1, 0]), torch.zeros(2)
    p = torch.softmax(logits[0], 0)
    assert load_balance(logits, gate, one).item() == pytest.approx(3 * float(p[0] + p[1]) / 2)
    assert router_z(logits, one).item() == pytest.approx(float(torch.logsumexp(logits[0], 0)) ** 2)
    assert load_balance(logits, gate, none).item() == router_z(logits, none).item() == 0
    assert per_row(gate, 2, none).tolist() == [[0.0] * 3] * 2


def test_auxiliary_loss_reaches_the_router():
    torch.manual_seed(0)
    config = LoraMoeConfig(balance_weight=0.5, router_z_loss=0.1, num_experts=4, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    x = torch.randn(3, 5, 8)
    model(x)
    router = model.base_model.model[0].parts("default")["router"]
    gate = torch.softmax(x.reshape(-1, 8) @ router.t(), -1)
    logits = x.reshape(-1, 8) @ router.t()
    expected = 0.5 * squared_variation(per_row(gate, 3, None)) + 0.1 * router_z(logits, None)
    loss = multiflora.auxiliary_loss(model)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert router.grad.any()
    model.eval()(x)
    assert multiflora.auxiliary_loss(model) == 0.0


def test_auxiliary_loss_of_models_without_routers_is_zero():
    assert multiflora.auxiliary_loss(nn.Linear(2, 2)) == 0.0


def test_a_loss_without_gradient_is_an_error():
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), RLoraConfig(router_z_loss=0.1, target_modules=["0"]))
    with torch.no_grad():
        model(torch.randn(2, 8))
    with pytest.raises(AdapterError, match="without"):
        multiflora.auxiliary_loss(model)


def test_knowledge_tasks_need_the_rows_tasks():
    config = LoraMoeConfig(
        balance_weight=0.5,
        balance_delta=0.2,
        task_names=["mmlu", "gsm8k"],
        knowledge_tasks=["mmlu"],
        target_modules=["0"],
    )
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    with pytest.raises(AdapterError, match=r"needs the task of each row.*mmlu, gsm8k"):
        model(torch.randn(2, 8))
    model(torch.randn(2, 8), task_id=torch.tensor([0, 1]))
    assert multiflora.auxiliary_loss(model) > 0
