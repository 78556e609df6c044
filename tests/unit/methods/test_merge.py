"""Merging is exact or refused, and a refusal changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import multiflora
from multiflora import ExportError
from multiflora.methods import build_config

NAMES = ["first", "second", "third"]


def trained(name, base, **settings):
    words = {"target_modules": ["0", "2"], "task_names": NAMES, "lora_dropout": 0.0} | settings
    model = get_peft_model(base, build_config(name, words)).eval()
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 64), nn.SiLU(), Conv1D(24, 64))


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=["plain", "rslora"])
@pytest.mark.parametrize("name", ["multilora", "mlora"])
def test_merged_equals_unmerged(name, settings, base):
    x = torch.randn(5, 7, 40)
    before = copy.deepcopy(base.state_dict())
    model = trained(name, base, **settings)
    kept = model(x)
    model.merge_adapter(safe_merge=True)
    assert torch.allclose(model(x), kept, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    assert torch.allclose(model.base_model.model[0].base_layer.weight, before["0.weight"], atol=1e-6)
    merged = model.merge_and_unload()
    assert type(merged[0]) is nn.Linear
    assert torch.allclose(merged(x), kept, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["moelora", "mtllora"])
def test_merges_exactly_for_each_task(name, base):
    x = torch.randn(3, 7, 40)
    kept = {}
    for task in NAMES:
        model = trained(name, copy.deepcopy(base))
        with multiflora.task(model, task):
            kept[task] = model(x)
            merged = model.merge_and_unload()
        assert torch.allclose(merged(x), kept[task], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(kept["first"], kept["second"], atol=1e-3)


@pytest.mark.parametrize("name", ["moelora", "mtllora"])
def test_merge_without_a_task_names_the_tasks(name, base):
    model = trained(name, base)
    with pytest.raises(ExportError, match=r"one weight per task.*first, second, third"):
        model.merge_adapter()


@pytest.mark.parametrize("name", ["rlora", "hydralora", "loramoe"])
@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
def test_routers_refuse_and_nothing_changes(name, verb, base):
    model = trained(name, base)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ExportError, match="router reads the input"):
        getattr(model, verb)()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_safe_merge_refuses_what_is_not_finite(base):
    model = trained("multilora", base)
    model.base_model.model[2].parts("default")["scale"].data.fill_(float("inf"))
    with pytest.raises(ExportError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)


@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload"])
def test_a_plain_and_a_routed_adapter_of_one_kind(verb, base):
    """Named together neither is merged; and the routed one is no obstacle to the other."""
    x = torch.randn(3, 40)
    plain, routed = {"gate": "sum", "stem": "own"}, {"gate": "token", "stem": "own"}
    model = trained("parts", base, **plain)
    model.add_adapter("routed", build_config("parts", {"target_modules": ["2"]} | routed))
    kept, before = model(x), copy.deepcopy(model.state_dict())
    for names in (["default", "routed"], ["routed", "default"]):
        with pytest.raises(ExportError, match="router reads the input"):
            getattr(model, verb)(adapter_names=names)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    model.set_adapter("routed")
    merged = getattr(model, verb)(adapter_names=["default"]) or model
    assert torch.allclose(merged(x), kept, atol=1e-5, rtol=1e-5)


def test_a_module_in_two_places_is_not_merged_into():
    """peft adapts one of the two; a merge would change both. One adapted layer that is called twice merges exactly."""
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    model = trained("multilora", nn.ModuleDict({"one": shared, "other": shared}), target_modules=["one", "other"])
    with pytest.raises(ExportError, match="Cannot merge into one: its weight is also that of other"):
        model.merge_adapter()
    block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    model, x = trained("multilora", nn.Sequential(block, block), target_modules=["0.0"]), torch.randn(3, 8)
    kept = model(x)
    assert torch.allclose(model.merge_and_unload()(x), kept, atol=1e-5)
