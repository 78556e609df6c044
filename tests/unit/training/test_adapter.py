"""The adapter is put on as the recipe says and saved whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from multiflora.adapter_folder import load_adapter
from multiflora.errors import AdapterError, ConfigError
from multiflora.recipe import Recipe, recipe_from
from multiflora.training import adapter
from multiflora.training.adapter import (
    add_adapter,
    check_answers,
    check_saving,
    probe,
    save_adapter,
    start_of,
)
from multiflora.training.packing import require_separate_examples

NAMES = ("sums", "words")


def make_recipe(method: Any, **changes: Any) -> Recipe:
    tasks = [{"name": name, "source": {"generator": "basic_arithmetic"}} for name in NAMES]
    return recipe_from({"model": "m", "method": method, "tasks": tasks, "output": "out", **changes})


def make_base(**words: Any) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, **words
    )
    return LlamaForCausalLM(config)


def test_our_methods_learn_the_names_of_the_tasks() -> None:
    model = add_adapter(make_base(), make_recipe({"name": "moelora", "r": 4, "num_experts": 2}))
    config = model.peft_config["default"]
    assert (config.num_tasks, config.task_names, config.task_type) == (2, list(NAMES), "CAUSAL_LM")


def test_pefts_lora_is_left_as_it_is() -> None:
    model = add_adapter(make_base(), make_recipe({"name": "lora", "r": 3}))
    assert (model.peft_config["default"].r, model.active_adapter) == (3, "default")


def test_the_start_depends_on_the_seed_alone() -> None:
    def start(seed: int) -> torch.Tensor:
        torch.rand(int(torch.randint(9, ())) + 1)  # whatever was drawn before
        state = get_peft_model_state_dict(add_adapter(make_base(), make_recipe("rlora", seed=seed)))
        return torch.cat([tensor.float().reshape(-1) for tensor in state.values()])

    assert torch.equal(start(3), start(3))
    assert not torch.equal(start(3), start(4))


def test_modules_that_do_not_exist_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"method: lora cannot be put on LlamaForCausalLM.*Check method.target_modules"
    ):
        add_adapter(make_base(), make_recipe({"name": "lora", "target_modules": ["no_such_proj"]}))


def test_a_balance_over_rows_and_packing_do_not_go_together() -> None:
    recipe = make_recipe({"name": "loramoe", "balance_weight": 0.1}, train={"packing": True})
    with pytest.raises(ConfigError, match=r"train.packing is true and method.balance_weight is 0.1"):
        add_adapter(make_base(), recipe)


@pytest.mark.parametrize("method", ["lora", "rlora"])
def test_a_saved_adapter_is_whole_and_loads_with_the_same_outputs(tmp_path: Path, method: str) -> None:
    model = add_adapter(make_base(), make_recipe(method)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    save_adapter(model, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again = PeftModel.from_pretrained(make_base(), str(tmp_path / "run")).eval()
    ids = torch.arange(6)[None]
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_an_adapter_that_lost_a_tensor_is_not_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_but_one(path: Path) -> dict[str, torch.Tensor]:
        tensors = load_file(path)
        tensors.pop(sorted(tensors)[0])
        return tensors

    monkeypatch.setattr(adapter, "load_file", load_but_one)
    model = add_adapter(make_base(), make_recipe("lora"))
    with pytest.raises(AdapterError, match=r"1 of \d+ tensors are missing and 0 are changed.*was not put in place"):
        save_adapter(model, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


PISSA = [
    {"modules_to_save": ["lm_head"]},
    {"trainable_token_indices": [3, 5]},
    {"bias": "all"},
    {"bias": "lora_only"},
    {"use_dora": True},
    {"use_rslora": True, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3}},
]


@pytest.mark.parametrize("settings", PISSA, ids=lambda settings: next(iter(settings)))
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_whose_start_was_taken_off_is_saved_for_the_model_as_it_was(
    tmp_path: Path, start: str, settings: dict[str, Any]
) -> None:
    method = {"name": "pissa" if start == "pissa" else "lora", "r": 2, "init_lora_weights": start, **settings}
    base = make_base(attention_bias=True)
    untouched = probe(base)
    model = add_adapter(base, make_recipe(method))
    first = start_of(model)
    check_saving(model, first)
    torch.testing.assert_close(probe(model), untouched, rtol=0, atol=1e-4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    save_adapter(model, tmp_path / "run", start=first)
    loaded = load_adapter(make_base(attention_bias=True), tmp_path / "run")
    check_answers(probe(model), probe(loaded), tmp_path, exact=True)
    with pytest.raises(AdapterError, match=r"answers otherwise than the model that was trained: .* off by \d+"):
        check_answers(probe(model), untouched, tmp_path, exact=False)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init_lora_weights": "eva"}, "is 'eva', which looks at data before the training"),
        ({"init_lora_weights": "corda"}, "is 'corda', which looks at data before the training"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS', but what is trained here is a causal language model"),
        ({"target_parameters": ["no.such"]}, "target_parameters holds 'no.such', and no parameter's name ends in that"),
    ],
)
def test_settings_that_would_be_passed_over_without_a_word_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        add_adapter(make_base(), make_recipe({"name": "lora", **settings}))


def test_a_run_that_would_be_lost_at_its_save_is_refused_before_it_trains() -> None:
    rounding = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}
    with pytest.raises(ConfigError, match=r"init_lora_weights is 'loftq'"):
        add_adapter(make_base(), make_recipe({"name": "lora", **rounding}))
    with pytest.raises(ConfigError, match=r"layer_replication is not available: .*not loaded again"):
        add_adapter(make_base(), make_recipe({"name": "lora", "layer_replication": [[0, 1], [0, 1]]}))
    model = add_adapter(make_base(), make_recipe("rlora"))
    with torch.no_grad():
        next(parameter for parameter in model.parameters() if parameter.requires_grad).fill_(torch.inf)
    with pytest.raises(ConfigError, match=r"would be lost at its end: .*holds NaN"):
        check_saving(model, None)


class Smearing(LlamaForCausalLM):
    """Lets every token see the one before it, whatever the mask says, as a recurrent model would."""

    def forward(self, **inputs: Any) -> Any:
        outputs = super().forward(**inputs)
        outputs.logits = outputs.logits.cumsum(1)
        return outputs


def test_packing_is_refused_where_examples_would_see_each_other() -> None:
    base = make_base()
    require_separate_examples(base)
    assert base.training
    leaking = Smearing(base.config)
    with pytest.raises(
        ConfigError, match=r"train.packing is true, but Smearing with sdpa attention lets an example see"
    ):
        require_separate_examples(leaking)


def test_packing_is_accepted_in_bfloat16_too() -> None:
    model: nn.Module = make_base().bfloat16()
    require_separate_examples(model)
