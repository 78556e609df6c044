"""One adapted layer: what is trained beside it, dropout head by head, and what it remembers between calls."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from multiflora import AdapterError
from multiflora.context import reference_loop
from multiflora.methods import build_config


def adapted(name, **more):
    torch.manual_seed(0)
    settings = {"target_modules": ["0"], "init_weights": False, "lora_dropout": 0.0, "num_tasks": 1}
    return get_peft_model(nn.Sequential(nn.Linear(6, 5)), build_config(name, settings | more)).train()


@pytest.mark.parametrize("name", ["hydralora", "multilora", "moelora"])
def test_a_bias_that_is_trained_gets_its_gradient(name):
    model, x = adapted(name, bias="all"), torch.randn(4, 6)
    layer = model.base_model.model[0]
    assert layer.base_layer.bias.requires_grad
    assert not layer.base_layer.weight.requires_grad
    model(x).sum().backward()
    assert torch.equal(layer.base_layer.bias.grad, torch.full((5,), 4.0))
    assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize("name", ["hydralora", "multilora", "moelora"])
def test_a_bias_that_is_no_parameter_is_added_as_it_is_now(name):
    model, x = adapted(name).eval(), torch.randn(4, 6)
    base = model.base_model.model[0].base_layer
    with torch.no_grad():
        whole, bias = model(x), base.bias.detach()
        del base.bias
        base.bias = bias * 3
        assert torch.allclose(model(x), whole + 2 * bias, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "dropout"),
    [
        ("hydralora", {"lora_dropout": 0.5}),
        ("rlora", {"head_dropout": 0.5}),
        ("rlora", {"lora_dropout": 0.5, "head_dropout": 0.5}),
        ("moelora", {"lora_dropout": 0.5}),
    ],
)
def test_dropout_head_by_head_is_that_of_the_packed_sum(name, dropout):
    model, x = adapted(name, **dropout), torch.randn(7, 6)

    def drawn():
        torch.manual_seed(3)
        return model(x)

    packed = drawn()
    with reference_loop(model):
        assert torch.allclose(drawn(), packed, atol=1e-6)
        without = model.eval()(x)
    assert torch.allclose(model(x), without, atol=1e-6)
    assert not torch.allclose(packed, without, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("hydralora", {"lora_dropout": 0.5}, {}),
        ("rlora", {"head_dropout": 0.5, "init_weights": "paper"}, {"head_dropout": 0.0}),  # with an offset, and without
        ("moelora", {"r": 16}, {"r": 8}),
    ],
)
def test_a_deleted_adapter_leaves_nothing_to_the_next_of_its_name(name, before, after):
    model, x = adapted(name, **before), torch.randn(7, 6)
    other = adapted(name, **after)
    config = other.peft_config["default"]
    model.add_adapter("two", config)
    model.delete_adapter("default")
    model.add_adapter("default", config)
    model.set_adapter("default")
    model.load_state_dict(other.state_dict(), strict=False)
    assert torch.equal(model.train()(x), other(x))
    assert torch.equal(model.eval()(x), other(x))


def test_a_deleted_adapter_is_in_none_of_a_layer_s_tables():
    model = adapted("hydralora")
    model.add_adapter("two", model.peft_config["default"])
    layer = model.base_model.model[0]
    model(torch.ones(1, 6))
    tables = [table for table in vars(layer).values() if isinstance(table, dict) and "default" in table]
    assert len(tables) == 4  # configs, plans, ranks, scaling
    model.delete_adapter("default")
    assert not any("default" in table for table in tables)


def test_a_batch_whose_rows_and_adapters_differ_in_number_is_refused():
    layer = adapted("hydralora").eval().base_model.model[0]
    with pytest.raises(AdapterError, match="same as the number of inputs, but got 2 and 3"):
        layer(torch.ones(3, 6), adapter_names=["default", "default"])


@pytest.mark.parametrize("name", ["hydralora", "multilora", "moelora"])
def test_a_layer_by_itself_and_in_its_model_gives_the_same(name):
    model, x = adapted(name).eval(), torch.randn(4, 6)
    layer = model.base_model.model[0]
    with torch.no_grad():
        alone = [layer(x), model(x), layer(x), model(x)]
        assert all(torch.equal(one, alone[0]) for one in alone)
        layer.parts("default")["A"].data.mul_(2)  # which torch does not count
        assert not torch.allclose(layer(x), alone[0])
        assert torch.equal(layer(x), model(x))
