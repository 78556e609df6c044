"""Settings of every method are of their type and within their range, from a recipe, from Python and from a file."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from multiflora import RLoraConfig
from multiflora.adapter_folder import check_adapter
from multiflora.errors import AdapterError, ConfigError
from multiflora.methods import METHODS, build_config, settings_of

BAD = {
    "r": ["4", None, 0, -1, 2.5, True, [4], 10**12, float("nan")],
    "init_r": ["4", None, 10**12, {}],
    "target_r": [[2]],
    "lora_alpha": [[1], "16", None, 0, -1, float("inf"), float("nan"), 1e300, {}],
    "lora_dropout": [{"p": 0.1}, "0.1", 1.0, -0.1, float("nan"), None],
    "num_heads": [10**18, 0, "3", 2.0],
    "num_experts": [10**18, None],
    "bias": ["evil", 3, None],
    "target_modules": [3, {"q_proj": 1}, [1]],
    "exclude_modules": [True],
    "modules_to_save": ["lm_head", [3], {"a": 1}],
    "trainable_token_indices": ["all", [-1], ["a"], {"embed_tokens": 3}],
    "layers_to_transform": ["all", [-1], 1.5],
    "rank_pattern": ["q_proj", {"q_proj": "2"}, {"q_proj": 0}, {3: 2}, [2]],
    "alpha_pattern": [{"q_proj": float("inf")}, {"q_proj": None}],
    "arrow_config": [{"a": 1}, "x", 3],
    "megatron_config": [{"a": 1}, 3],
    "layer_replication": [[[0, 1]]],
    "eva_config": [{}, {"rho": 1}][1:],
    "use_rslora": ["yes", 1, None],
    "init_lora_weights": ["evil", 3, "pissa_niter_9999999999"],
    "num_virtual_tokens": ["20", 0, 10**12],
    "top_k": [0, "1"],
    "temperature": [0, float("inf"), "x"],
    "beta1": [0, 1, "x"],
    "task_names": [[1, 2], "abc"],
    "init_seed": [-1, 2**70, "0"],
    "loraplus_lr_ratio": [float("inf"), "16", None],
    "examples": [10**12, "5"],
    "revision": [3, ["main"]],
}


@pytest.mark.parametrize("name", [name for name, card in METHODS.items() if card.config])
def test_a_value_of_another_type_or_out_of_range_is_refused_by_its_name(name):
    known = set(settings_of(name))
    for key, values in BAD.items():
        for value in values if key in known else ():
            with pytest.raises(ConfigError, match=rf"(method\.|Config: ){key}(\[.*\])? (is|holds|has)"):
                build_config(name, {key: value})


@pytest.mark.parametrize("name", [name for name, card in METHODS.items() if card.config])
def test_every_default_of_a_method_is_taken(name):
    defaults = {key: value for key, value in vars(build_config(name, {})).items() if key in settings_of(name)}
    build_config(name, defaults)


def test_the_class_itself_checks_too():
    with pytest.raises(ConfigError, match=r"RLoraConfig: rank_pattern is 'q_proj'; it must be a mapping of names"):
        RLoraConfig(rank_pattern="q_proj")


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(ConfigError) as caught:
        build_config("lora", {"r": "x" * 10**6})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "change",
    [
        {"r": None},
        {"r": "2"},
        {"lora_alpha": 1e300},
        {"lora_alpha": float("inf")},
        {"lora_dropout": {}},
        {"task_names": [1]},
        {"bias": "evil"},
        {"target_modules": 3},
        {"modules_to_save": "lm_head"},
        {"layers_to_transform": "all"},
        {"rank_pattern": {"q_proj": None}},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["LORA", "MF_RLORA"])
def test_a_saved_config_is_checked_by_the_same_rule(tmp_path, kind, change):
    if kind == "LORA" and "task_names" in change:
        pytest.skip("peft's LoRA has no names of tasks")
    words = {"peft_type": kind, "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]} | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(words), "utf-8")
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=rf"adapter_config\.json: {next(iter(change))}(\[.*\])? is"):
        check_adapter(tmp_path)
