"""The table of methods: what holds where a recipe says nothing, and that a card agrees with the class it is about."""

from __future__ import annotations

import dataclasses
from importlib import import_module

import peft
import pytest
import torch
from torch import nn

import multiflora
from multiflora import ConfigError
from multiflora.methods import METHODS, build_config, describe, merges, settings_of

RATES = {
    "full": 2e-5,
    "loraplus": 1e-4,
    "adalora": 1e-3,
    "ia3": 3e-3,
    "prompt": 3e-2,
    "prefix": 1e-2,
    "ptuning": 1e-3,
    "losparse": 9e-5,
}
TRAINS = {"full": "weights", "prompt": "prompt", "prefix": "prompt", "ptuning": "prompt", "losparse": "factors"}
WITHOUT_TARGETS = {"full", "ia3", "prompt", "prefix", "ptuning", "losparse"}

# what a recipe or a script gets where it gives a name alone; a change of these changes runs that nobody has touched
SHARED = {"r": 8, "lora_alpha": 16, "use_rslora": False, "lora_dropout": 0.0, "bias": "none", "init_weights": True}
ROUTED = {"top_k": None, "router_balance_loss": 0.0, "router_z_loss": 0.0}
RANDOM = {"r": 4, "lora_alpha": 32, "num_heads": 3, "head_dropout": 0.2, "gamma": 64.0}
OURS = {
    "multilora": {"num_modules": 3, "scale_shape": "vector", "use_alpha": True},
    "rlora": {**RANDOM, **ROUTED, "router_init": "zero"},
    "mlora": {**RANDOM, "reduce": "mean"},
    "hydralora": {**ROUTED, "r": 4, "lora_alpha": 32, "lora_dropout": 0.05, "num_heads": 3},
    "moelora": {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "num_experts": 8,
        "task_embedding_dim": 64,
        "shared_gate": True,
    },
    "loramoe": {
        **ROUTED,
        "r": 4,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "num_experts": 8,
        "balance_weight": 0.0,
        "balance_delta": 0.0,
        "knowledge_tasks": None,
    },
    "mtllora": {"lora_dropout": 0.05, "num_heads": 3, "temperature": 0.1, "task_matrix": "full"},
    "mixlora": {"lora_dropout": 0.05, "num_experts": 8, "top_k": 2, "router_balance_loss": 0.001, "router_z_loss": 0.0},
    "alignlora": {"lora_alpha": 32, "align_weight": 0.2},
    "loraga": {"gamma": 16.0, "gradient_batches": 8},
    "deltalora": {"update_ratio": 2.0, "start_step": 0},
    "parts": {
        **ROUTED,
        "num_heads": 3,
        "stem": "shared",
        "heads": "zero",
        "gate": "token",
        "offset": False,
        "head_dropout": 0.0,
        "task_matrix": "none",
        "num_stems": 3,
        "core": "none",
        "num_cores": 4,
        "router_init": "kaiming",
        "gamma": 64.0,
        "scale_shape": "vector",
        "temperature": 0.1,
        "task_embedding_dim": 64,
        "frozen": None,
        "router_scores": "softmax",
        "stem_init": "kaiming",
        "router_entropy_loss": 0.0,
        "orthogonality_loss": 0.0,
    },
}
OF_PEFT = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "adalora": {"init_r": 12, "target_r": 8, "total_step": 1},
    "prompt": {"num_virtual_tokens": 20, "prompt_tuning_init": "SAMPLE_VOCAB"},
    "prefix": {"num_virtual_tokens": 20, "encoder_hidden_size": 128},
    "ptuning": {"num_virtual_tokens": 20, "encoder_hidden_size": 128},
}
KIND = {
    "lora": "LoraConfig",
    "loraplus": "LoraConfig",
    "rslora": "LoraConfig",
    "dora": "LoraConfig",
    "pissa": "LoraConfig",
    "lorahub": "LoraConfig",
    "adalora": "AdaLoraConfig",
    "ia3": "IA3Config",
    "prompt": "PromptTuningConfig",
    "prefix": "PrefixTuningConfig",
    "ptuning": "PromptEncoderConfig",
}


@pytest.mark.parametrize("name", METHODS)
def test_what_holds_where_a_recipe_says_nothing(name):
    card = METHODS[name]
    assert card.name == name
    assert card.learning_rate == RATES.get(name, 2e-4)
    assert card.trains == TRAINS.get(name, "adapter")
    assert card.target_modules == (None if name in WITHOUT_TARGETS else "all-linear")
    config = build_config(name, {})
    expected = (SHARED | OURS[name]) if name in OURS else OF_PEFT.get(name, {})
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize("name", METHODS)
def test_a_card_agrees_with_its_class(name):
    card = METHODS[name]
    config = build_config(name, {})
    assert set(card.settings) <= set(settings_of(name))
    if name in KIND:
        assert type(config) is getattr(peft, KIND[name])
        assert describe(name).name == name
    elif name in OURS:
        module = import_module(f"multiflora.methods.{name}")
        assert type(config) is getattr(multiflora, card.config) is getattr(module, card.config)
        assert describe(name) is module.METHOD
        assert describe(name).name == config.method_name == name
        assert describe(name).of(config).merges() == merges(name, {}).partition(" (")[0]
    else:
        assert card.config is None


@pytest.mark.parametrize("name", [name for name, card in METHODS.items() if card.module])
def test_every_setting_says_what_it_is(name):
    peft_s = {item.name for item in dataclasses.fields(peft.PeftConfig)}
    for item in dataclasses.fields(getattr(multiflora, METHODS[name].config)):
        if item.name not in peft_s:
            assert item.metadata["help"].endswith((".", ")")), item.name


def test_a_card_says_whether_experts_can_be_adapted():
    for name, card in METHODS.items():
        if card.module is not None:
            method = describe(name)
            refusal = method.refuses_experts(build_config(name, {"num_tasks": 2}))
            assert (card.experts == "with target_parameters") == (refusal is None)
            assert (card.experts == "no") == (refusal is not None and "Set" not in refusal)
    assert METHODS["alignlora"].experts == "with target_parameters, and align_weight 0"
    assert describe("alignlora").refuses_experts(build_config("alignlora", {"align_weight": 0.0})) is None


def test_whether_it_merges_is_the_settings_where_these_decide():
    assert merges("lora", {}) == merges("multilora", {}) == "exactly"
    assert merges("parts", {"gate": "task"}) == "per task"
    assert merges("parts", {"gate": "sum", "stem": "own"}) == "exactly"
    assert merges("parts", {}) == "no"
    assert merges("prompt", {}) == "no (virtual tokens)"


def test_words_that_a_method_does_not_have():
    for name in ("lora", "rlora"):
        known = settings_of(name)
        assert {"r", "lora_alpha", "target_modules", "task_type"} <= set(known)
        assert not {"peft_type", "auto_mapping", "peft_version", "inference_mode", "runtime_config"} & set(known)
        assert "base_model_name_or_path" not in known
    assert not {"r", "total_step", "rank_pattern"} & set(settings_of("adalora"))
    assert not {"num_layers", "token_dim", "num_attention_heads"} & set(settings_of("prefix"))
    assert "num_transformer_submodules" not in settings_of("prompt") + settings_of("ptuning")
    assert not {"bias", "use_dora", "modules_to_save", "init_lora_weights"} & set(settings_of("lorahub"))
    assert not {"lora_bias", "trainable_token_indices", "target_parameters"} & set(settings_of("lorahub"))
    assert settings_of("full") == []
    assert settings_of("loraplus")[0] == "loraplus_lr_ratio"
    for ask in (settings_of, describe):
        with pytest.raises(ConfigError, match=r"method\.name is 'rlor'; there is no such method; did you mean rlora"):
            ask("rlor")
    with pytest.raises(ConfigError) as caught:
        build_config("lora", dict.fromkeys("abcde", 1))
    assert str(caught.value).count("is not a setting of lora") == 3
    assert str(caught.value).endswith("And 2 more are not.")
    with pytest.raises(ConfigError) as caught:
        build_config("lora", dict.fromkeys("abc", 1))
    assert "more" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("dora", {"use_dora": False}, r"method\.use_dora is False, but dora is peft's LoraConfig with use_dora=True"),
        ("rslora", {"use_rslora": False}, r"method\.use_rslora is False, but rslora"),
        ("pissa", {"init_lora_weights": True}, "pissa starts by a singular value decomposition"),
        ("adalora", {"init_r": 4, "target_r": 4}, "target_r must be less than init_r"),
        ("adalora", {"init_r": 1}, "target_r must be less than init_r"),
        ("lora", {"layer_replication": [[0, 1]]}, "layer_replication is not available"),
        ("lora", {"megatron_config": {"a": 1}}, "megatron_config is"),
    ],
)
def test_settings_that_do_not_go_together(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        build_config(name, settings)


def test_settings_that_go_together():
    assert build_config("dora", {"use_dora": True}).use_dora
    assert build_config("pissa", {"init_lora_weights": "pissa_niter_4"}).init_lora_weights == "pissa_niter_4"
    assert build_config("lora", {"layer_replication": None}).layer_replication is None
    adalora = build_config("adalora", {"init_r": 9, "tinit": 2, "tfinal": 3})
    assert (adalora.target_r, adalora.total_step) == (6, 6)
    assert build_config("adalora", {"init_r": 2, "target_r": 1}).target_r == 1
    assert not hasattr(build_config("loraplus", {"loraplus_lr_ratio": 4.0}), "loraplus_lr_ratio")
    with pytest.raises(ConfigError, match=r"method: .*feedforward_modules"):
        build_config("ia3", {"target_modules": ["a"], "feedforward_modules": ["b"]})


@pytest.mark.parametrize("name", ["lora", "dora", "adalora"])
def test_shapes_of_peft_s_methods_are_those_that_peft_makes(name):
    torch.manual_seed(0)
    rank = describe(name).rank_key
    config = build_config(name, {rank: 3, "target_modules": ["0"], **({"target_r": 2} if name == "adalora" else {})})
    model = peft.get_peft_model(nn.Sequential(nn.Linear(5, 7)), config)
    made = sorted(tuple(weight.shape) for weight in model.parameters() if weight.requires_grad)
    assert sorted(describe(name).shapes(config, 3, 5, 7).values()) == made
    assert describe("ia3").shapes is describe("full").shapes is None


# peft's fields that a baseline cannot use, or that peft fills in: not one of them is offered
NOT_OFFERED = {
    "adalora": "r total_step rank_pattern",
    "prompt": "token_dim num_transformer_submodules num_attention_heads num_layers",
    "prefix": "token_dim num_transformer_submodules num_attention_heads num_layers",
    "ptuning": "token_dim num_transformer_submodules num_attention_heads num_layers",
    "lorahub": "bias lora_bias modules_to_save trainable_token_indices target_parameters layer_replication use_dora "
    "init_lora_weights",
}


@pytest.mark.parametrize("name", [name for name, card in METHODS.items() if card.module is None and card.config])
def test_what_a_baseline_cannot_use_is_not_offered(name: str) -> None:
    fields = {item.name for item in dataclasses.fields(getattr(peft, METHODS[name].config))}
    internal = {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "inference_mode"}
    left_out = set(NOT_OFFERED.get(name, "").split())
    assert left_out <= fields
    offered = set(settings_of(name)) - set(METHODS[name].training)
    assert offered == fields - internal - {"runtime_config"} - left_out


@pytest.mark.parametrize("name", [name for name, card in METHODS.items() if card.module is None and card.config])
def test_the_rank_of_a_baseline_is_one_of_its_settings(name: str) -> None:
    baseline = describe(name)
    if baseline.shapes is not None:
        assert baseline.rank_key == {"adalora": "init_r"}.get(name, "r")
        assert baseline.rank_key in settings_of(name)
