"""What a token router may be asked for, and what it adds to the loss: each term by its weight, over real tokens."""

from __future__ import annotations

import pytest
import torch

from multiflora import ConfigError, HydraLoraConfig, LoraMoeConfig, MixLoraConfig, RLoraConfig
from multiflora.forward_pass import Pass, Side, Tokens
from multiflora.methods.base import LossInputs
from multiflora.methods.losses import load_balance, router_z
from multiflora.methods.router import ROUTER_LOSS, router_loss


def seen(logits=True, gate=True):
    torch.manual_seed(0)
    rows = torch.randn(4, 3)
    best = torch.softmax(rows.masked_fill(rows == rows.min(1, keepdim=True).values, -torch.inf), 1)
    mask = torch.tensor([[1, 1], [1, 0]])
    tokens = Tokens(Pass(None), "up", Side(2, 2, mask), torch.Size([2, 2]))
    seen_by = best.t() if gate else None, rows.t() if logits else None
    return rows, best, LossInputs(torch.zeros(2, 4), *seen_by, tokens, {})


@pytest.mark.parametrize(("balance", "z"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.25), (0.5, 0.25)])
def test_each_term_has_its_weight(balance, z):
    rows, gate, layer = seen()
    config = MixLoraConfig(num_experts=3, router_balance_loss=balance, router_z_loss=z)
    keep = torch.tensor([1, 1, 1, 0])
    expected = balance * load_balance(rows, gate, keep) + z * router_z(rows, keep)
    found = router_loss(config, layer)
    assert (found is None) == (not balance and not z)
    assert ROUTER_LOSS.on(config) == (found is not None)
    assert found is None or float(found) == pytest.approx(float(expected))


def test_without_a_router_there_is_nothing_to_add():
    config = MixLoraConfig(num_experts=3)
    assert router_loss(config, seen(logits=False)[2]) is None
    assert router_loss(config, seen(gate=False)[2]) is None


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        (MixLoraConfig, {"num_experts": 4, "top_k": 4}, r"top_k is 4; .* from 2 to one less than num_experts \(4\)"),
        (HydraLoraConfig, {"num_heads": 4, "top_k": 1}, r"top_k is 1; .* one less than num_heads \(4\)"),
        (HydraLoraConfig, {"num_heads": 2, "top_k": 2}, "top_k is 2"),
        (HydraLoraConfig, {"router_balance_loss": 0.1}, "without top_k all are: set top_k"),
        (RLoraConfig, {"top_k": 2, "init_weights": "zero"}, "a router at zero prefers none"),
        (RLoraConfig, {"top_k": 2, "router_init": "kaiming"}, "would not take the random start off"),
    ],
)
def test_choices_that_cannot_work(kind, words, message):
    with pytest.raises(ConfigError, match=message):
        kind(**words)


def test_choices_that_work():
    assert MixLoraConfig(num_experts=3, top_k=2).top_k == 2
    assert MixLoraConfig(num_experts=5, top_k=4, router_balance_loss=0.1).top_k == 4
    assert LoraMoeConfig(router_z_loss=0.1).top_k is None
    assert RLoraConfig(top_k=2, init_weights="zero", router_init="kaiming").top_k == 2
    assert RLoraConfig(init_weights="zero", router_init="zero", head_dropout=0.1).head_dropout == 0.1
    assert RLoraConfig(init_weights="zero", router_init="zero", head_dropout=0.0, num_heads=1).num_heads == 1
    assert RLoraConfig(init_weights="paper", router_init="zero", head_dropout=0.0).router_init == "zero"
