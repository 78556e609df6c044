"""The contract of what is adapted: peft's words, with peft's meaning."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from contract.cases import layers, logits, relative, stir
from multiflora import AdapterError


def names(model):
    """Of all adapted layers, in the base model's own words."""
    adapted = set(layers(model))
    return {name.removeprefix("base_model.model.model.") for name, module in model.named_modules() if module in adapted}


def test_target_modules(case, tiny_llama):
    """target_modules as list, regular expression, or all-linear, which leaves the output layer out."""
    listed = names(case.adapt(tiny_llama(), target_modules=["q_proj", "down_proj"]))
    assert len(listed) == 4
    assert names(case.adapt(tiny_llama(), target_modules=r".*\.(q|down)_proj")) == listed
    everything = names(case.adapt(tiny_llama()))
    assert len(everything) == 14
    assert not any("lm_head" in name for name in everything)


def test_exclude_modules(case, tiny_llama):
    """exclude_modules leaves modules out."""
    assert not {name for name in names(case.adapt(tiny_llama(), exclude_modules=["q_proj"])) if "q_proj" in name}
    assert len(names(case.adapt(tiny_llama(), exclude_modules=r".*layers\.0\..*"))) == 7


def test_layers_to_transform(case, tiny_llama):
    """layers_to_transform adapts the layers named."""
    adapted = names(case.adapt(tiny_llama(), target_modules=["q_proj", "up_proj"], layers_to_transform=[1]))
    assert adapted == {"layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"}


def test_patterns(case, tiny_llama):
    """rank_pattern, alpha_pattern and use_rslora, alone and together."""
    words = {"r": 16, "lora_alpha": 8, "rank_pattern": {"q_proj": 32}, "alpha_pattern": {r"layers.1.*up_proj": 20}}
    for rslora in (False, True):
        model = case.adapt(tiny_llama(), use_rslora=rslora, **words)
        for name, layer in model.named_modules():
            if layer in set(layers(model)):
                r = 32 if name.endswith("q_proj") else 16
                alpha = 20 if "layers.1." in name and name.endswith("up_proj") else 8
                assert layer.ranks["default"] == r
                assert layer.scaling["default"] == pytest.approx(alpha / (math.sqrt(r) if rslora else r))


def test_bias(case, tiny_llama):
    """bias='all' and 'lora_only' train the biases."""
    for bias, expected in (("none", 0), ("all", 8), ("lora_only", 2)):
        model = case.adapt(tiny_llama(attention_bias=True), bias=bias, target_modules=["q_proj"])
        assert sum(w.requires_grad for name, w in model.named_parameters() if name.endswith(".bias")) == expected


def test_init_seed(case, tiny_llama):
    """init_seed alone decides the start, whatever torch's generator did before."""
    one = case.adapt(tiny_llama(), seed=1, init_seed=7).state_dict()
    two = case.adapt(tiny_llama(), seed=2, init_seed=7).state_dict()
    three = case.adapt(tiny_llama(), seed=2, init_seed=8).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], three[name]) for name in one)


def test_conv1d(case):
    """transformers' Conv1D (GPT-2): the base at the start, and the same sum as on a Linear."""
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 1}
    base = GPT2LMHeadModel(GPT2Config(**shape, eos_token_id=2)).eval()
    before = logits(base, None)
    model = case.adapt(base, target_modules=["c_attn", "c_proj"], task_names=["verse"])
    none = torch.zeros(2, dtype=torch.long)
    assert relative(logits(model, none), before) < 1e-6
    expected = logits(stir(model), none)
    assert relative(expected, before) > 1e-2
    if case.merges == "no":
        # no merge to compare with: the layer by itself, its weight turned round
        layer = next(layers(model))
        x = torch.randn(3, layer.in_features)
        with torch.no_grad():
            update = layer(x) - layer.base_layer(x)
            layer.base_layer = torch.nn.Identity()
            layer.routing.loop = True
            alone = layer._add_branches(x, torch.zeros(3, layer.out_features), "default")
        assert torch.allclose(update, alone, atol=1e-5)
    else:
        assert relative(logits(model.merge_and_unload(), None), expected) < 1e-5


def test_other_kinds_of_layers(case, tiny_llama, refused):
    """Layers that are not linear are refused by name before anything is replaced."""
    base = tiny_llama()
    with pytest.raises(AdapterError, match=r"embed_tokens is a Embedding.*only linear layers") as raised:
        case.adapt(base, target_modules=["q_proj", "embed_tokens"])
    assert not list(layers(base))
    refused(raised.value)
