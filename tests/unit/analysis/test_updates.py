"""The update of each layer is what the method adds to the weight: merged minus base, for every method that merges."""

from __future__ import annotations

import copy

import pytest
import torch

from multiflora.analysis.updates import adapter_updates, decompose, dense_updates, heads_of, place_of_layer
from multiflora.errors import AdapterError
from multiflora.methods import build_config

LAYER = "model.layers.1.mlp.up_proj"


def adapted(tiny_llama, config):
    from peft import get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(), config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "magnitude" not in name:
                p.add_(0.1 * torch.randn_like(p))
    return model


def matrix(update) -> torch.Tensor:
    return update.B if update.A is None else update.B @ update.A


def peft_config(**words):
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["up_proj"], **words)


@pytest.mark.parametrize(
    "make",
    [
        lambda: peft_config(),
        lambda: peft_config(use_rslora=True),
        lambda: peft_config(use_dora=True),
        lambda: build_config("multilora", {"r": 2, "target_modules": ["up_proj"]}),
        lambda: build_config("mlora", {"target_modules": ["up_proj"]}),
    ],
    ids=["lora", "rslora", "dora", "multilora", "mlora"],
)
def test_it_is_the_merged_weight_minus_the_base(tiny_llama, make):
    model = adapted(tiny_llama, make())
    found = adapter_updates(model)
    assert set(found) == {"model.layers.0.mlp.up_proj", LAYER}
    before = tiny_llama().get_submodule(LAYER).weight
    merged = copy.deepcopy(model).merge_and_unload().get_submodule(LAYER).weight
    assert torch.allclose(matrix(found[LAYER]), merged - before, atol=1e-5)
    assert matrix(found[LAYER]).abs().max() > 1e-3


def test_adalora_s_update_is_what_it_adds_to_an_output(tiny_llama):
    from peft import AdaLoraConfig

    model = adapted(tiny_llama, AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["up_proj"]))
    layer = model.get_base_model().get_submodule(LAYER)
    x = torch.randn(3, 32)
    added = layer(x) - layer.base_layer(x)
    assert torch.allclose(x @ matrix(adapter_updates(model)[LAYER]).t(), added, atol=1e-5)


def test_a_router_s_heads_are_blended_by_the_mean_gate(tiny_llama):
    model = adapted(tiny_llama, build_config("hydralora", {"num_heads": 2, "r": 2, "target_modules": ["up_proj"]}))
    layer = model.get_base_model().get_submodule(LAYER)
    A, B = layer.parts("default")["A"], heads_of(model)[LAYER]
    alone = adapter_updates(model, {layer.name: torch.tensor([1.0, 0.0])})[LAYER]
    assert torch.allclose(matrix(alone), layer.scaling["default"] * B[0] @ A, atol=1e-5)
    even = adapter_updates(model)[LAYER]
    assert torch.allclose(matrix(even), layer.scaling["default"] * B.mean(0) @ A, atol=1e-5)


@pytest.mark.parametrize("method", ["moelora", "mtllora"])
def test_a_method_with_an_update_for_each_task_gives_their_mean(tiny_llama, method):
    import multiflora

    model = adapted(tiny_llama, build_config(method, {"target_modules": ["up_proj"], "task_names": ["a", "b"]}))
    layer = model.get_base_model().get_submodule(LAYER)
    with torch.no_grad():
        each = []
        for task in ("a", "b"):
            with multiflora.task(model, task):
                each.append(layer.get_delta_weight("default"))
    assert torch.allclose(matrix(adapter_updates(model)[LAYER]), (each[0] + each[1]) / 2, atol=1e-6)


def test_full_fine_tuning_is_a_difference_of_weights(tiny_llama):
    base, model = tiny_llama(), tiny_llama()
    with torch.no_grad():
        model.get_submodule(LAYER).weight[0, 0] += 2.0
    found = dense_updates(model, base)
    assert "lm_head" not in found
    _, singular, _ = decompose(found[LAYER])
    assert singular[0] == pytest.approx(2.0, rel=1e-5)
    assert singular[1] == pytest.approx(0.0, abs=1e-6)


def test_prompt_methods_have_no_update(tiny_llama):
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(tiny_llama(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(AdapterError, match="A PROMPT_TUNING adapter adds nothing to weight matrices"):
        adapter_updates(model)


def test_places():
    assert place_of_layer("model.layers.3.mlp.up_proj") == (3, "up_proj")
    assert place_of_layer("score") == (-1, "score")
