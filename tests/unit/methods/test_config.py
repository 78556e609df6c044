"""Settings that cannot work are refused by field, value and range, before any module has been replaced."""

from __future__ import annotations

import pytest
from peft import get_peft_model
from torch import nn

import multiflora
from multiflora import AdapterError, ConfigError
from multiflora.compress.spec import CompressSpec
from multiflora.methods import METHODS, build_config
from multiflora.methods.config import own_settings

REFUSED = [
    ("rlora", {"r": 0}, "r is 0; it must be a whole number of at least 1"),
    ("rlora", {"num_heads": 0}, "num_heads is 0"),
    ("rlora", {"head_dropout": 1.0}, r"head_dropout is 1.0; it must be in \[0, 1\)"),
    ("rlora", {"lora_dropout": -0.1}, r"lora_dropout is -0.1"),
    ("rlora", {"gamma": 0}, "gamma is 0; it must be a number above 0"),
    ("rlora", {"init_weights": "gaussian"}, "init_weights is 'gaussian'; it must be one of"),
    ("rlora", {"init_weights": "zero", "head_dropout": 0.0}, "keeps all heads identical for ever"),
    ("mlora", {"reduce": "max"}, "reduce is 'max'; it must be one of 'mean', 'sum'"),
    ("multilora", {"num_modules": 2.5}, "num_modules is 2.5"),
    ("multilora", {"scale_shape": "matrix"}, "scale_shape is 'matrix'"),
    ("moelora", {"r": 10, "num_experts": 4}, r"r is 10; it must be a multiple of num_experts \(4\)"),
    ("moelora", {"num_tasks": 0}, "num_tasks is 0"),
    ("mtllora", {"temperature": 0.0}, "temperature is 0.0"),
    ("loramoe", {"balance_delta": 0.1, "balance_weight": 1.0}, "set knowledge_tasks"),
    ("loramoe", {"knowledge_tasks": ["mmlu"]}, "which task_names"),
    ("hydralora", {"rank_pattern": {"up": 0}}, r"rank_pattern\['up'\] is 0"),
    ("hydralora", {"bias": "some"}, "bias is 'some'"),
    ("hydralora", {"task_names": ["a", "a"]}, "a name twice"),
    ("hydralora", {"task_names": ["a"], "num_tasks": 2}, "make them agree"),
    ("hydralora", {"target_parameters": ["w"], "layers_to_transform": 0}, "does not go with target_parameters"),
    ("hydralora", {"layer_replication": [[0, 1]]}, "replicate the layers yourself"),
    ("hydralora", {"ensure_weight_tying": True}, "ensure_weight_tying is True"),
    ("hydralora", {"rank_pattern": {"(": 2}}, r"rank_pattern key '\(' is not a regular expression"),
    ("hydralora", {"alpha_pattern": {"(": 2}}, r"alpha_pattern key '\(' is not a regular expression"),
    (
        "hydralora",
        {"target_modules": ".*up", "layers_to_transform": 0},
        "layers_to_transform cannot be used",
    ),
    (
        "hydralora",
        {"target_modules": ".*up", "layers_to_transform": [1], "layers_pattern": "h"},
        "layers_pattern can",
    ),
    ("hydralora", {"layers_pattern": "h"}, "without layers_to_transform: say which layers"),
    (
        "moelora",
        {"rank_pattern": {"up": 12}},
        r"rank_pattern\['up'\] is 12; it must be a multiple of num_exp",
    ),
    ("mlora", {"init_weights": "zero", "head_dropout": 0.0}, "keeps all heads identical for ever"),
    ("rlora", {"num_head": 3}, r"method.num_head is not a setting of rlora; did you mean num_heads"),
    ("rlor", {}, "there is no such method; did you mean rlora"),
]


@pytest.mark.parametrize(("name", "settings", "message"), REFUSED, ids=[f"{n}-{s}" for n, s, _ in REFUSED])
def test_refused(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        build_config(name, settings)


def test_all_problems_at_once():
    with pytest.raises(ConfigError, match=r"r is 0.*head_dropout is 2"):
        build_config("rlora", {"r": 0, "head_dropout": 2})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.emb, self.conv = nn.Linear(4, 4), nn.Embedding(4, 4), nn.Conv2d(1, 1, 1)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("moelora", {"target_modules": ["lin"]}, "num_tasks is None"),
        ("rlora", {"target_modules": ["lin", "emb"]}, "Target module emb is a Embedding"),
        ("rlora", {"target_modules": ["lin", "conv"]}, "Target module conv is a Conv2d"),
        (
            "rlora",
            {"target_modules": ["lin"], "rank_pattern": {"up_proj": 4}},
            "rank_pattern key 'up_proj' matches none",
        ),
        ("rlora", {"target_modules": ["lin"], "alpha_pattern": {"x": 4}}, "alpha_pattern key 'x' matches none"),
    ],
)
def test_refused_before_a_module_is_replaced(name, settings, message):
    net = Net()
    before = {key: type(module) for key, module in net.named_modules()}
    with pytest.raises(AdapterError, match=message):
        get_peft_model(net, build_config(name, settings))
    assert before == {key: type(module) for key, module in net.named_modules()}


def test_the_table_of_methods_says_what_the_classes_have():
    for card in METHODS.values():
        if card.module:
            config = getattr(multiflora, card.config)
            assert sorted(own_settings(config)) == sorted(card.settings)
            assert config.method_name == card.name


def test_losparse_s_settings_are_those_of_its_spec():
    assert METHODS["losparse"].training == CompressSpec().model_dump()
    assert list(METHODS["losparse"].settings) == list(CompressSpec.model_fields)
    assert build_config("losparse", {"keep": 0.3}) == CompressSpec(keep=0.3)


def test_names_give_the_number_of_tasks():
    assert build_config("rlora", {"task_names": ["a", "b"]}).num_tasks == 2


def test_suggested_heads_are_the_number_of_topics():
    topics = ["the cat sat on the mat", "prove that x squared is even", "translate this into french please"]
    texts = [f"{topic} {word}" for topic in topics for word in ("now", "then", "again", "soon", "later", "today")]
    assert multiflora.suggest_num_heads(texts, most=8) == 3
    with pytest.raises(multiflora.DataError, match="at least two"):
        multiflora.suggest_num_heads(["one", "one"])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("hydralora", {"target_modules": ["up"], "layers_to_transform": 0, "layers_pattern": "h"}),
        ("hydralora", {"target_modules": "all-linear", "layers_to_transform": [0, 2], "layers_pattern": ["h"]}),
        ("hydralora", {"rank_pattern": {".*up": 2}, "alpha_pattern": {"^a": 3.0}, "task_names": ["a", "b"]}),
        ("hydralora", {"task_names": ["a", "b"], "num_tasks": 2, "ensure_weight_tying": False}),
        ("moelora", {"rank_pattern": {"up": 24}}),
        ("mlora", {"init_weights": "zero", "head_dropout": 0.1}),
        ("mlora", {"init_weights": "zero", "head_dropout": 0.0, "num_heads": 1}),
        ("mlora", {"init_weights": "paper", "head_dropout": 0.0}),
        ("loramoe", {"balance_weight": 1.0}),
        ("loramoe", {"balance_delta": 0.1}),
        ("loramoe", {"balance_weight": 1.0, "balance_delta": 0.1, "knowledge_tasks": ["a"], "task_names": ["a", "b"]}),
    ],
)
def test_taken(name, settings):
    config = build_config(name, settings)
    assert all(getattr(config, key) == value for key, value in settings.items() if key != "target_modules")


@pytest.mark.parametrize("name", [name for name, card in METHODS.items() if card.module])
def test_the_start_of_tests_is_there_for_every_method(name):
    assert build_config(name, {"init_weights": False}).init_weights is False
    if name != "multilora":
        with pytest.raises(ConfigError, match="init_weights is 'evil'; it must be one of True, False"):
            build_config(name, {"init_weights": "evil"})
