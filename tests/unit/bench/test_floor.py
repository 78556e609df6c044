"""The floor counts what the packed op really computes."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from multiflora import MultiLoraConfig
from multiflora.bench import steps
from multiflora.bench.floor import modules_products, products, run_products
from multiflora.bench.layers import adapted, competitor, matched_rank, run_layer
from multiflora.bench.steps import linear_shapes, smollm2

CPU = torch.device("cpu")


def accumulated(_, a, b, **__):
    """Operations of addmm_ by its shapes, which torch's counter leaves out."""
    return 2 * a[0] * a[1] * b[1]


IN_PLACE = {torch.ops.aten.addmm_: accumulated}


@pytest.mark.parametrize(("heads", "rank"), [(5, 8), (1, 2), (16, 2)])
def test_flops_are_those_of_the_layer_beyond_the_frozen_one(heads, rank):
    base = nn.Linear(48, 80, bias=False).requires_grad_(False)
    x, grad = torch.randn(30, 48, requires_grad=True), torch.randn(30, 80)
    counted = {}
    for name in ("frozen", "packed"):
        layer = competitor(name, base, heads=heads, rank=rank, dropout=0.1)
        run = run_layer(layer, x, grad, autocast=False)
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            run()
        counted[name] = counter.get_total_flops()
    assert counted["packed"] - counted["frozen"] == products(30, 48, 80, heads, rank).flops()


def test_those_of_multilora_too():
    base = nn.Linear(48, 80, bias=False).requires_grad_(False)
    x, grad = torch.randn(30, 48, requires_grad=True), torch.randn(30, 80)
    config = MultiLoraConfig(r=4, num_modules=3, lora_dropout=0.1, target_modules=["0"])
    counted = []
    for layer in (base, adapted(base, config)):
        run = run_layer(layer, x, grad, autocast=False)
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            run()
        counted.append(counter.get_total_flops())
    assert counted[1] - counted[0] == modules_products(30, 48, 80, 3, 4).flops()


@pytest.mark.parametrize("count", [products, modules_products])
def test_the_timed_products_are_the_counted_ones(count):
    work = count(30, 48, 80, 5, 8)
    run = run_products(work, torch.float32, CPU)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        phases = run()
    assert counter.get_total_flops() == work.flops()
    assert set(phases) == {"forward", "backward"}


def test_the_products_of_a_step_are_those_of_every_layer():
    model = smollm2(torch.float32, torch.device("cpu"), hidden_size=36, intermediate_size=64, num_hidden_layers=3)
    lora = get_peft_model(model, LoraConfig(r=steps.MODULES * steps.RANK, target_modules="all-linear"))
    parameters, _ = lora.get_nb_trainable_parameters()
    work = steps.work_alone(lora.unload(), tokens=10)["multilora products"]
    # forward, and twice that backward: two operations for each parameter and token
    assert sum(item.flops() * count for item, count in work.items()) == 3 * 2 * 10 * parameters


def test_bytes_by_hand():
    # x twice, dx in and out; y in and out, dy twice: four passes over each width
    assert products(10, 3, 5, heads=2, rank=1).bytes(item=2) == 2 * 10 * (4 * 3 + 4 * 5)


def test_matched_rank_gives_as_many_parameters():
    for d_in, d_out in ((576, 1536), (4096, 4096), (4864, 896)):
        ours = 8 * d_in + 5 * 8 * d_out + 5 * d_in
        theirs = matched_rank(d_in, d_out, heads=5, rank=8) * (d_in + d_out)
        assert abs(theirs / ours - 1) < 0.03


def test_linear_shapes_leave_the_head_out():
    model = smollm2(torch.float32, CPU, num_hidden_layers=2, vocab_size=64, hidden_size=36, intermediate_size=48)
    shapes = linear_shapes(model)
    assert sum(shapes.values()) == 2 * 7
    assert shapes[36, 48] == 2 * 2
    assert (36, 64) not in shapes
