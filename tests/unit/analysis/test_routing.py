"""Routing: loads, entropies and dead heads of gates that are known, padding left out."""

from __future__ import annotations

import math

import pytest
import torch

import multiflora
from multiflora.analysis.routing import RoutingCounter, recording
from multiflora.context import Routing
from multiflora.forward_pass import Pass, Side, Tokens
from multiflora.methods import build_config


def count(gate, tasks=None, num_tasks=2, mask=None):
    routing = Routing()
    counter = RoutingCounter(routing, num_tasks)
    lead = (len(gate),) if mask is None else mask.shape
    side = Side(lead[0], None if mask is None else lead[1], mask)
    with routing.reporting(Tokens(Pass(None), "layer", side, torch.Size(lead))):
        counter("layer", torch.tensor(gate), None if tasks is None else torch.tensor(tasks))
    return counter


def test_load_and_entropy_of_a_known_gate():
    layer = count([[1.0, 0.0], [0.5, 0.5]]).result()["layer"]
    assert layer.load == [0.75, 0.25]
    assert layer.entropy == pytest.approx(0.5)  # of 0 and log 2, over log 2
    assert layer.by_task == []
    assert layer.dead == []


def test_load_by_task():
    layer = count([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], tasks=[0, 1, 1]).result()["layer"]
    assert layer.by_task == [[1.0, 0.0], [0.25, 0.75]]


def test_a_dead_head_is_found():
    layer = count([[0.499, 0.499, 0.002]]).result()["layer"]
    assert layer.dead == [2]


def test_padding_does_not_count():
    mask = torch.tensor([[1, 0], [1, 0]])
    layer = count([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], mask=mask).result()["layer"]
    assert layer.load == [1.0, 0.0]


@pytest.mark.parametrize("loop", [False, True])
def test_the_padding_of_a_batch_does_not_count_in_a_model(tiny_llama, loop):
    from peft import get_peft_model

    settings = {"num_heads": 3, "target_modules": ["up_proj"]}
    model = get_peft_model(tiny_llama(), build_config("hydralora", settings)).eval()
    ids, short = torch.arange(12).view(2, 6), torch.tensor([[0, 1, 2, 3]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]])
    multiflora.context.find(model).loop = loop
    with recording(model, 1) as counter, torch.no_grad():
        model(input_ids=short)
        alone = counter.result()
        model(input_ids=ids, attention_mask=mask)
        padded = counter.result()
        model(input_ids=ids)
        whole = counter.result()
    for layer, found in alone.items():
        assert padded[layer].load == pytest.approx(found.load, abs=1e-5)
        assert padded[layer].entropy == pytest.approx(found.entropy, abs=1e-5)
    assert any(whole[layer].load != pytest.approx(found.load, abs=1e-5) for layer, found in alone.items())


def test_batches_add_up_and_a_result_starts_anew():
    counter = count([[1.0, 0.0]])
    counter("layer", torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]), None)
    assert counter.result()["layer"].load == [0.25, 0.75]
    assert counter.result() == {}


def test_every_layer_of_a_model_is_counted_and_the_recorder_taken_off(tiny_llama):
    from peft import get_peft_model

    settings = {"num_heads": 3, "target_modules": ["up_proj"], "task_names": ["a", "b"]}
    model = get_peft_model(tiny_llama(), build_config("hydralora", settings)).eval()
    ids = torch.arange(12).view(2, 6)
    with recording(model, 2) as counter, torch.no_grad():
        model(input_ids=ids, task_id=torch.tensor([0, 1]))
        found = counter.result()
    assert len(found) == 2
    for layer in found.values():
        assert sum(layer.load) == pytest.approx(1)
        assert [sum(row) for row in layer.by_task] == pytest.approx([1, 1])
        assert 0 < layer.entropy <= 1
    assert multiflora.context.find(model).recorder is None


def test_a_zero_router_is_undecided(tiny_llama):
    from peft import get_peft_model

    model = get_peft_model(tiny_llama(), build_config("rlora", {"num_heads": 4, "target_modules": ["up_proj"]})).eval()
    with recording(model, 1) as counter, torch.no_grad():
        model(input_ids=torch.arange(6).unsqueeze(0))
        layers = counter.result().values()
    assert all(layer.entropy == pytest.approx(1) for layer in layers)
    assert all(math.isclose(load, 0.25, rel_tol=1e-6) for layer in layers for load in layer.load)


def test_a_model_without_gates_records_nothing(tiny_llama):
    with recording(tiny_llama(), 1) as counter:
        assert counter is None
