"""How a row's task reaches the layers, and what is said when it does not fit."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import multiflora
from multiflora import AdapterError, MoeLoraConfig
from multiflora.context import find


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = MoeLoraConfig(target_modules=["0"], task_names=["sum", "sort"], init_weights=False, lora_dropout=0.0)
    return get_peft_model(nn.Sequential(nn.Linear(6, 6)), config).eval()


def test_by_name_by_id_and_with_the_batch(model):
    x = torch.randn(2, 6)
    with multiflora.task(model, "sort"):
        by_name = model(x)
        both = model(x, task_id=torch.tensor([0, 1]))  # ids with the batch come first
    with multiflora.task(model, 1):
        assert torch.equal(model(x), by_name)
    assert torch.equal(both[1], by_name[1])
    assert not torch.equal(both[0], by_name[0])
    assert torch.equal(model(x, task_id=["sum", "sort"]), both)


def test_a_missing_task_names_the_tasks(model):
    with pytest.raises(AdapterError, match=r"needs the task of each row.*sum, sort"):
        model(torch.randn(2, 6))


def test_the_context_ends(model):
    with pytest.raises(ZeroDivisionError), multiflora.task(model, "sum"):
        _ = 1 / 0
    assert find(model).default is None


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([0, 2]), r"from 0 to 2, but the adapter has 2 tasks \(sum, sort\)"),
        (torch.tensor([-1, 0]), "from -1 to 0"),
        (torch.tensor([0.0, 1.0]), "must hold whole numbers"),
        (torch.tensor([0, 1, 1]), r"has shape \(3,\), but the batch has 2 rows"),
        (torch.tensor([[0, 1], [1, 1]]), "does not fit a layer input"),
        (["sum", "sotr"], "no task 'sotr'; its tasks are sum, sort"),
    ],
)
def test_ids_that_do_not_fit(model, ids, message):
    with pytest.raises(AdapterError, match=message):
        model(torch.randn(2, 6), task_id=ids)


def test_an_unknown_name(model):
    with (
        pytest.raises(AdapterError, match="no task 'product'; its tasks are sum, sort"),
        multiflora.task(model, "product"),
    ):
        pass


def test_other_models_are_left_alone():
    with multiflora.task(nn.Linear(2, 2), "anything"):
        pass


def test_a_copy_has_a_state_of_its_own(model):
    model(torch.randn(2, 6), task_id=torch.tensor([0, 1]))
    other = copy.deepcopy(model)
    assert find(other) is not find(model)
    with multiflora.task(other, "sum"):
        other(torch.randn(2, 6))
        with pytest.raises(AdapterError, match="needs the task"):
            model(torch.randn(2, 6))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate_takes_a_task_for_each_row(num_beams):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    words = {"target_modules": "all-linear", "task_names": ["a", "b"], "init_weights": False, "lora_alpha": 200}
    model = get_peft_model(LlamaForCausalLM(config), MoeLoraConfig(**words, task_type="CAUSAL_LM")).eval()
    ids = torch.randint(1, 50, (2, 4))
    words = {"max_new_tokens": 8, "do_sample": False, "num_beams": num_beams, "pad_token_id": 0, "eos_token_id": None}
    mixed = model.generate(input_ids=ids, task_id=torch.tensor([0, 1]), **words)
    with multiflora.task(model, ["a", "b"]):
        assert torch.equal(model.get_base_model().generate(input_ids=ids, **words), mixed)
    with multiflora.task(model, "a"):
        first = model.generate(input_ids=ids, **words)
    with multiflora.task(model, "b"):
        second = model.generate(input_ids=ids, **words)
    assert torch.equal(mixed[0], first[0])
    assert torch.equal(mixed[1], second[1])
    assert not torch.equal(first, second)
