"""How a row's task reaches the layers, and what is said when it does not fit."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import multiflora
from multiflora import AdapterError, HydraLoraConfig, MoeLoraConfig
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


def test_an_adapter_that_was_told_of_no_tasks_takes_no_part():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 6)), HydraLoraConfig(target_modules=["0"])).eval()
    x, seen = torch.randn(2, 6), []
    find(model).recorder = lambda layer, gate, tasks: seen.append(tasks)
    with multiflora.task(model, "sum"):
        model(x)
    assert seen == [None]
    model(x, task_id=torch.tensor([7, 3]))
    assert seen[1].tolist() == [7, 3]
    with pytest.raises(AdapterError, match=r"no task 'sum'; its tasks are not named in its config \(set task_names\)"):
        model(x, task_id=["sum", "sort"])


class Cut(nn.Module):
    """A layer that sees each row's vector cut into pieces, or more pieces than rows in an order of its own."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.lin = shape, nn.Linear(6, 6)

    def forward(self, x):
        return self.lin(x.reshape(self.shape)).reshape(x.shape)


def cut(*shape):
    torch.manual_seed(0)
    config = MoeLoraConfig(target_modules=["lin"], task_names=["sum", "sort"], init_weights=False, lora_dropout=0.0)
    return get_peft_model(Cut(shape), config).eval()


def test_pieces_of_rows_have_their_row_s_task_where_their_order_is_known():
    x, both = torch.randn(2, 12), torch.tensor([0, 1])
    rows = cut(2, 2, 6)
    wanted = torch.cat([rows(x, task_id=torch.tensor([one]))[one : one + 1] for one in both])
    assert torch.equal(rows(x, task_id=both), wanted)
    flat = cut(4, 6)
    with pytest.raises(AdapterError, match=r"lin sees 4 tokens of a batch of 2 rows, and not in the order of the rows"):
        flat(x, task_id=both)
    assert torch.equal(flat(x, task_id=torch.tensor([1, 1])), rows(x, task_id=torch.tensor([1, 1])))


def test_a_layer_called_by_itself_takes_a_task_for_each_of_its_rows_or_one_for_all(model):
    layer, x = model.base_model.model[0], torch.randn(4, 6)
    with multiflora.task(model, ["sum", "sort", "sort", "sum"]):
        each = layer(x)
    for name, rows in (("sum", [0, 3]), ("sort", [1, 2])):
        with multiflora.task(model, name):
            assert torch.equal(layer(x)[rows], each[rows])
    with multiflora.task(model, ["sum", "sum", "sort", "sort"]):
        copies = layer(x)
    with multiflora.task(model, ["sum", "sort"]):  # copies of a row lie together
        assert torch.equal(layer(x), copies)
    with (
        multiflora.task(model, ["sum", "sort", "sum"]),
        pytest.raises(AdapterError, match=r"tasks for 3 rows, but .* 4"),
    ):
        layer(x)


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


def test_a_thread_begins_with_all_that_it_may_remember(model):
    """torch.compile guards which attributes there are: one that came with the first pass made it fail in that pass."""
    seen = []
    for run in (lambda: None, lambda: model(torch.ones(1, 6), task_id=["sum"])):
        thread = threading.Thread(target=lambda run=run: (run(), seen.append(set(vars(find(model)._here)))))
        thread.start()
        thread.join()
    assert seen[0] == seen[1]
    assert {"current", "last", "default"} <= seen[0]


def test_a_generation_is_one_pass_and_another_is_another():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = get_peft_model(LlamaForCausalLM(config), HydraLoraConfig(target_modules=["q_proj"])).eval()
    routing, ids, seen = find(model), torch.randint(1, 50, (1, 4)), []
    model.base_model.model.model.layers[0].register_forward_hook(lambda *_: seen.append(routing.number))
    assert routing.number is None
    for _ in range(2):
        model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert len(seen) == 6
    assert seen[0] == seen[1] == seen[2] < seen[3] == seen[4] == seen[5]
    model(ids)
    assert seen[6] > seen[5]
    assert routing.number is None


def test_an_adapter_that_joins_on_other_layers_is_not_trained_beside_the_active_one():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), HydraLoraConfig(target_modules=["0"]))
    model.add_adapter("two", HydraLoraConfig(target_modules=["1"]))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained
    assert all(name.endswith(".default") and ".0." in name for name in trained)
    model.set_adapter("two")
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained
    assert all(name.endswith(".two") and ".1." in name for name in trained)
