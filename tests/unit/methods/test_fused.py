"""Fused experts are found in every kind of mixture, and leaving them out is said."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mixtures import MIXTURES, mixture
from peft import get_peft_model
from transformers import Llama4ForCausalLM, Llama4TextConfig, LlamaForCausalLM

from multiflora.errors import AdapterError
from multiflora.methods import build_config
from multiflora.methods.fused import LEFT_OUT, fused_parameters, left_out, targeted


@pytest.mark.parametrize("kind", MIXTURES)
def test_every_fused_parameter_is_found(kind: str) -> None:
    model = mixture(kind)
    found = [name for name, _ in fused_parameters(model)]
    assert found == [
        name for name, parameter in model.named_parameters() if "experts." in name and parameter.dim() == 3
    ]
    assert len({name.rpartition(".")[2] for name in found}) == 2


def test_all_linear_says_which_parameters_it_leaves_out() -> None:
    with pytest.warns(UserWarning, match=LEFT_OUT) as said:
        model = get_peft_model(mixture("mixtral"), build_config("rlora", {"target_modules": "all-linear"}))
    (told,) = [str(one.message) for one in said if one.category is UserWarning]
    assert "2 x model.layers.*.mlp.experts.gate_up_proj, 2 x model.layers.*.mlp.experts.down_proj" in told
    assert told == left_out(model.get_base_model())
    assert "\n" not in told


def test_nothing_is_said_where_nothing_is_left_out(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(tiny_llama(), build_config("rlora", {"target_modules": "all-linear"}))
        get_peft_model(mixture("mixtral"), build_config("rlora", {"target_modules": ["q_proj"]}))
    assert left_out(tiny_llama()) == ""


def test_what_is_left_out_tells_how_to_adapt_it() -> None:
    model = mixture("nemotron")
    told = left_out(model)
    assert told.endswith("To adapt them, too: target_parameters=['experts.up_proj', 'experts.down_proj'].")
    some = targeted(model, ["experts.up_proj"])
    assert left_out(model, some).endswith("target_parameters=['experts.down_proj'].")
    assert left_out(model, targeted(model, ["experts.up_proj", "experts.down_proj"])) == ""


def test_parameters_are_named_as_in_peft() -> None:
    model = mixture("mixtral")
    first = "model.layers.0.mlp.experts.down_proj"
    assert list(targeted(model, [first])) == [first]
    assert len(targeted(model, ["down_proj"])) == len(targeted(model, ["experts.down_proj"])) == 2
    assert not targeted(model, ["xperts.down_proj"])  # whole parts of a name alone


def adapt(model: Any, *names: str, method: str = "rlora") -> Any:
    words = {"target_modules": [], "target_parameters": list(names), "r": 2}
    return get_peft_model(model, build_config(method, words))


def expert_parallel() -> Any:
    model = mixture("mixtral")
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    return model


def eight_bits() -> Any:
    model = mixture("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    return model


def another_layout() -> Any:
    config = Llama4TextConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=8,
        intermediate_size_mlp=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        pad_token_id=0,
    )
    return Llama4ForCausalLM(config)


REFUSED = {
    "no such name": (lambda: mixture("mixtral"), "nothing", r"'nothing', and no parameter.*layers\.\*\.mlp\.experts"),
    "no experts": (lambda: mixture("mixtral"), "q_proj.weight", r"q_proj\.weight is no matrix of experts"),
    "a bias": (lambda: mixture("gpt-oss"), "down_proj_bias", r"down_proj_bias is no matrix of experts"),
    "expert parallelism": (expert_parallel, "experts.down_proj", r"layers\.1.*expert parallelism"),
    "eight bits": (eight_bits, "experts.down_proj", r"layers\.0.*is quantised.*float8"),
    "another layout": (another_layout, "experts.down_proj", r"Llama4TextExperts, whose layout only its own code knows"),
    "the model itself": (lambda: mixture("mixtral").model.layers[0].mlp.experts, "down_proj", "the model itself"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_refused_before_anything_is_replaced(case: str) -> None:
    make, name, message = REFUSED[case]
    model = make()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises((AdapterError, ValueError), match=message):
        adapt(model, name)
    assert [name for name, _ in model.named_modules()] == before


def test_experts_named_as_modules_are_refused_with_the_way_to_name_them() -> None:
    words = {"target_modules": ["experts"], "r": 2}
    with pytest.raises(AdapterError, match=r"experts is a MixtralExperts.*named in target_parameters"):
        get_peft_model(mixture("mixtral"), build_config("rlora", words))


@pytest.mark.parametrize("first", ["rlora", "lora"])
def test_experts_carry_adapters_of_one_method(first: str) -> None:
    model = adapt(mixture("mixtral"), "experts.down_proj", method=first)
    with pytest.raises(AdapterError, match=r"experts\.down_proj already carries an adapter of another kind"):
        adapt(model.get_base_model(), "experts.down_proj", method="hydralora")


def test_a_method_that_compares_tasks_in_a_layer_names_the_setting_that_turns_it_off() -> None:
    words = {"target_modules": [], "target_parameters": ["experts.down_proj"], "num_tasks": 2}
    with pytest.raises(AdapterError, match=r"loss of alignlora.*Set align_weight to 0"):
        get_peft_model(mixture("mixtral"), build_config("alignlora", words))


def test_linear_layers_of_the_same_name_are_not_mixed_up_with_experts() -> None:
    """jamba has dense layers with a down_proj beside those with experts, and a second adapter of linear layers."""
    model = mixture("jamba")
    linear = [name for name, _ in model.named_modules() if name.endswith("down_proj")]
    assert linear
    adapted = adapt(model, "experts.down_proj")
    adapted.add_adapter("two", build_config("rlora", {"target_modules": ["down_proj"], "r": 2}))
    held = {name.partition(".mf_")[0] for name, _ in adapted.named_parameters() if name.endswith(".two")}
    assert {name.removeprefix("base_model.model.") for name in held} == set(linear)
