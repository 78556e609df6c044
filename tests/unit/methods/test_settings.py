"""Settings of every method are of their type and within their range, from a recipe, from Python and from a file."""

from __future__ import annotations

import json
from importlib import import_module

import peft
import pytest
import torch
from safetensors.torch import save_file

from multiflora import RLoraConfig
from multiflora.adapter_folder import check_adapter
from multiflora.errors import AdapterError, ConfigError
from multiflora.methods import METHODS, build_config, settings_of
from multiflora.methods.settings import setting_problems

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


MANY, HEADS, STEPS = 10**6, 10**4, 10**12
WHOLE = {
    **dict.fromkeys(("r", "init_r", "target_r", "num_virtual_tokens", "encoder_hidden_size", "deltaT"), (1, MANY)),
    **dict.fromkeys(("task_embedding_dim", "gradient_batches", "qalora_group_size", "examples", "budget"), (1, MANY)),
    **dict.fromkeys(("num_heads", "num_experts", "num_modules", "num_tasks", "encoder_num_layers"), (1, HEADS)),
    **dict.fromkeys(("tinit", "tfinal", "start_step"), (0, STEPS)),
    "init_seed": (0, 2**63 - 1),
}
ABOVE_0 = ("lora_alpha", "gamma", "temperature", "loraplus_lr_ratio", "update_ratio")
FROM_0 = ("router_z_loss", "router_balance_loss", "balance_weight", "align_weight", "orth_reg_weight")
BELOW_1 = ("lora_dropout", "head_dropout", "encoder_dropout", "balance_delta")
EDGES = {
    **{name: ([least, most], [least - 1, most + 1]) for name, (least, most) in WHOLE.items()},
    **dict.fromkeys(ABOVE_0, ([1e-9, MANY], [0, MANY + 1])),
    **dict.fromkeys(FROM_0, ([0, MANY], [-1e-9, MANY + 1])),
    **dict.fromkeys(BELOW_1, ([0, 0.999], [-1e-9, 1])),
    "beta1": ([1e-9, 0.999], [0, 1]),
    "alpha_pattern": ([{"up": 1e-9}, {}], [{"up": 0}]),
    "rank_pattern": ([{"up": 1}, {}], [{"up": 0}, {"up": MANY + 1}]),
    "layers_to_transform": ([0, [0, 7], None], [-1, [0, -1]]),
    "target_modules": (["all-linear", ["a"], ("a",), {"a"}, None], [1, [1]]),
    "task_type": (["CAUSAL_LM", None], [3]),
    "use_rslora": ([True, False], [0, "no"]),
}


@pytest.mark.parametrize("name", [name for name, card in METHODS.items() if card.config])
def test_ranges_are_taken_to_their_edges_and_no_further(name):
    card = METHODS[name]
    config_class = getattr(peft if card.module is None else import_module(card.module), card.config)
    wrong = []
    for key in EDGES.keys() & set(settings_of(name)):
        if (name, key) == ("adalora", "rank_pattern"):  # its masks
            continue
        for place, values in enumerate(EDGES[key]):
            for value in values:
                found = list(setting_problems(config_class, {key: value}, extra=card.training))
                if len(found) != place or not all(problem.startswith(key) for problem in found):
                    wrong.append((key, value, found))
    assert not wrong


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("rlora", {"r": "4"}, "r is '4'; it must be a whole number of at least 1, and at most 1,000,000."),
        ("rlora", {"gamma": 0}, "gamma is 0; it must be a number above 0, and at most 1,000,000."),
        ("rlora", {"head_dropout": 1}, "head_dropout is 1; it must be in [0, 1)."),
        ("adalora", {"beta1": 1}, "beta1 is 1; it must be in (0, 1)."),
        ("rlora", {"use_rslora": 1}, "use_rslora is 1; it must be true or false."),
        ("rlora", {"router_init": 1}, "router_init is 1; it must be text."),
        ("rlora", {"bias": "evil"}, "bias is 'evil'; it must be one of 'none', 'all', 'lora_only'."),
        ("rlora", {"modules_to_save": 1}, "modules_to_save is 1; it must be a list, of text each or null."),
        ("rlora", {"rank_pattern": {3: 2}}, "rank_pattern has the key 3; it must be text."),
        (
            "rlora",
            {"alpha_pattern": {"up": "x"}},
            "alpha_pattern['up'] is 'x'; it must be a number above 0, and at most 1,000,000.",
        ),
        (
            "rlora",
            {"rank_pattern": [1]},
            "rank_pattern is [1]; it must be a mapping of names, to a whole number of at least 1, and at most 1,000,000"
            " each.",
        ),
        (
            "lora",
            {"arrow_config": {"a": 1}},
            "arrow_config is {'a': 1}; it takes an object of Python, which a file cannot hold. Leave it out.",
        ),
    ],
)
def test_what_is_said(name, settings, words):
    with pytest.raises(ConfigError) as caught:
        build_config(name, settings)
    assert str(caught.value) == f"method.{words}"


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
