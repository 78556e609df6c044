"""Fused experts are found in every kind of mixture, and leaving them out is said."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
from mixtures import MIXTURES, mixture
from peft import get_peft_model
from transformers import LlamaForCausalLM

from multiflora.methods import build_config
from multiflora.methods.fused import LEFT_OUT, fused_parameters, left_out


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
