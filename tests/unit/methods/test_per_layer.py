"""How many heads a layer has: by block, by name, and what becomes of it in shapes, counts, files and errors."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from contract.cases import IDS, stir
from peft import PeftModel, get_peft_model

from multiflora.adapter_folder import check_adapter, load_adapter
from multiflora.comparison.budget import adapted_widths, count_flops, count_parameters, solve_rank
from multiflora.errors import AdapterError, ConfigError
from multiflora.estimate import count_parameters as count_on_model
from multiflora.export.convert import to_lora
from multiflora.export.expand import expand
from multiflora.methods import build_config, describe
from multiflora.methods.layer import BranchLinear

MLP = {"target_modules": ["gate_proj", "up_proj", "down_proj"]}
TASKS = {"task_names": ["verse", "prose"]}
# method -> settings with a list, and the rank that suits all its numbers
BY_BLOCK = {
    "multilora": {"num_modules": [1, 3]},
    "rlora": {"num_heads": [1, 3]},
    "mlora": {"num_heads": [2, 3]},
    "hydralora": {"num_heads": [2, 4], "top_k": 2},
    "moelora": {"num_experts": [2, 3], "r": 6, "shared_gate": False},
    "loramoe": {"num_experts": [1, 3]},
    "mixlora": {"num_experts": [2, 4]},
    "mtllora": {"num_heads": [1, 3]},
    "parts": {"num_heads": [3, 2], "stem": "own"},
}


def adapted(base, name, **settings):
    return get_peft_model(base, build_config(name, MLP | TASKS | settings))


def numbers(model):
    """Layer -> number of heads, by the size of its tensors alone."""
    found = {}
    for layer in model.modules():
        if isinstance(layer, BranchLinear):
            plan = layer.plan("default")
            found[layer.name] = layer.parts("default")["B"].shape[1] // plan.rank
    return found


def test_a_list_has_a_number_for_each_block(tiny_llama):
    model = adapted(tiny_llama(num_hidden_layers=4), "mixlora", num_experts=[2, 4, 6, 8])
    found = numbers(model)
    assert len(found) == 12
    for block, number in enumerate((2, 4, 6, 8)):
        layer = model.base_model.model.model.layers[block].mlp.down_proj
        assert found[layer.name] == number == layer.plan("default").heads == len(layer.parts("default")["router"])


def test_a_pattern_comes_before_the_list_and_before_the_number(tiny_llama):
    model = adapted(tiny_llama(), "rlora", num_heads=[2, 3], heads_pattern={"up_proj": 5, r"layers\.0.*down_proj": 1})
    assert {name.partition("layers.")[2]: number for name, number in numbers(model).items()} == {
        "0.mlp.gate_proj": 2,
        "0.mlp.up_proj": 5,
        "0.mlp.down_proj": 1,
        "1.mlp.gate_proj": 3,
        "1.mlp.up_proj": 5,
        "1.mlp.down_proj": 3,
    }
    only = numbers(adapted(tiny_llama(), "rlora", num_heads=4, heads_pattern={"up_proj": 1}))
    assert sorted(only.values()) == [1, 1, 4, 4, 4, 4]


def test_the_block_is_the_first_number_of_a_name_or_that_behind_layers_pattern():
    config = build_config("mlora", {"num_heads": [2, 3, 4]})
    assert config.at("decoder.block.1.layer.0.wi").num_heads == 3
    inner = build_config("mlora", {"num_heads": [2, 3, 4], "layers_pattern": "layer"})
    assert inner.at("decoder.block.1.layer.0.wi").num_heads == 2
    several = build_config("mlora", {"num_heads": [2, 3, 4], "layers_pattern": ["h", "layer"]})
    assert several.at("decoder.block.1.layer.2.wi").num_heads == 4


def test_heads_no_more_than_top_k_all_serve(tiny_llama):
    model = adapted(tiny_llama(), "mixlora", num_experts=[2, 4], heads_pattern={"down_proj": 1}).train()
    stir(model)
    first, second = (model.base_model.model.model.layers[block].mlp for block in (0, 1))
    for layer, top_k, sparse in ((first.up_proj, None, 0.0), (first.down_proj, None, 0.0), (second.up_proj, 2, 0.001)):
        own = layer.configs["default"]
        assert (own.top_k, own.router_balance_loss) == (top_k, sparse)
        assert layer.plan("default").left_to_op == (top_k is None)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert float(first.down_proj.parts("default")["router"].grad.abs().max()) < 1e-9  # one head has nobody beside it


def test_a_layer_reads_the_adapter_s_settings_as_they_are_now():
    config = build_config("hydralora", {"num_heads": [2, 4], "top_k": 2})
    own = config.at("layers.1.up")
    assert (own.num_heads, own.top_k, own.r) == (4, 2, config.r)
    before, config.top_k = own.changes, 3
    assert (own.top_k, config.at("layers.0.up").top_k) == (3, None)
    assert own.changes > before
    own.router_z_loss = 0.5  # a layer's config is no place of its own
    assert config.router_z_loss == 0.5
    for copied in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert (copied.num_heads, copied.top_k, copied.method_name) == (4, 3, "hydralora")
    plain = build_config("hydralora", {})
    assert plain.at("anything") is plain


@pytest.mark.parametrize("name", BY_BLOCK)
def test_saved_loaded_and_checked_without_the_base(name, tiny_llama, tmp_path):
    model = stir(adapted(tiny_llama(), name, **BY_BLOCK[name])).eval()
    words = {"input_ids": IDS, "task_id": torch.tensor([1, 0])}
    with torch.no_grad():
        before = model(**words).logits
        model.save_pretrained(tmp_path)
        assert check_adapter(tmp_path).head_counts() == model.peft_config["default"].head_counts()
        assert torch.equal(load_adapter(tiny_llama(), tmp_path).eval()(**words).logits, before)
        assert torch.equal(PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()(**words).logits, before)


@pytest.mark.parametrize("name", BY_BLOCK)
def test_counted_without_the_model(name, tiny_llama):
    base, settings = tiny_llama(), MLP | TASKS | BY_BLOCK[name]
    widths, config = adapted_widths(base.config, settings), build_config(name, settings)
    assert count_parameters(describe(name), config, widths) == count_on_model(get_peft_model(base, config))[0]
    dense = {"top_k": None, "router_balance_loss": 0.0} if hasattr(config, "top_k") else {}  # as many operations
    alone = 0
    for width in widths:
        number = {config.heads_setting: settings[config.heads_setting][int(width.name.split(".")[2])]}
        alone += count_flops(describe(name), build_config(name, settings | dense | number), [width]).training
    assert count_flops(describe(name), config, widths).training == alone


def test_a_budget_is_met_with_a_rank_that_all_layers_can_have(tiny_llama):
    widths = adapted_widths(tiny_llama().config, MLP)
    settings = {"num_experts": [2, 3], "shared_gate": False, **TASKS}
    solved = solve_rank("moelora", settings, widths, 4000)
    assert solved.rank % 6 == 0
    assert solved.parameters == count_parameters(describe("moelora"), build_config("moelora", solved.settings), widths)


def test_a_merged_method_merges_and_converts(tiny_llama, tmp_path):
    model = stir(adapted(tiny_llama(), "multilora", num_modules=[1, 3])).eval()
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        model.save_pretrained(tmp_path / "adapter")
        to_lora(model, tmp_path / "plain")
        plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain").eval()
        assert torch.allclose(plain(input_ids=IDS).logits, before, atol=1e-5)
        assert torch.allclose(model.merge_and_unload()(input_ids=IDS).logits, before, atol=1e-5)
    words = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert {words["r"], *words["rank_pattern"].values()} == {8, 24}


def test_a_lora_expands_to_as_many_heads_as_a_layer_shall_have(tiny_llama, tmp_path):
    from peft import LoraConfig

    stir(get_peft_model(tiny_llama(), LoraConfig(r=4, **MLP))).save_pretrained(tmp_path / "lora")
    expand(tmp_path / "lora", tmp_path / "more", method="hydralora", num_heads=[2, 5])
    grown = PeftModel.from_pretrained(tiny_llama(), tmp_path / "more")
    assert sorted(numbers(grown).values()) == [2, 2, 2, 5, 5, 5]
    lora = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    with torch.no_grad():
        assert torch.allclose(grown(input_ids=IDS).logits, lora(input_ids=IDS).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("rlora", {"num_heads": []}, "num_heads is an empty list; give a number for each block"),
        ("rlora", {"num_heads": [3, 0]}, r"num_heads is \[3, 0\]; it must be a whole number of at least 1"),
        ("rlora", {"num_heads": [3, "4"]}, r"num_heads is \[3, '4'\]; it must be"),
        ("rlora", {"heads_pattern": {"up_proj": 0}}, r"heads_pattern\['up_proj'\] is 0; it must be"),
        ("rlora", {"heads_pattern": {"(": 2}}, r"heads_pattern key '\(' is not a regular expression"),
        ("alignlora", {"heads_pattern": {"up_proj": 2}}, "heads_pattern is given, and a layer of alignlora has one"),
        ("mixlora", {"num_experts": [2, 1]}, r"top_k is 2; .* one less than num_experts \(2\)"),
        ("moelora", {"num_experts": [2, 3], "r": 4, "shared_gate": False}, r"multiple of num_experts \(3\)"),
        ("moelora", {"num_experts": [2, 4], "r": 4}, "2 or 4 experts, and one gate for all .* set shared_gate=False"),
    ],
)
def test_settings_that_cannot_work(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        build_config(name, settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": [2, 3, 4]}, "num_heads has 3 numbers, and model.layers has 2 blocks: give one number for each"),
        ({"num_heads": [2]}, "num_heads has 1 numbers, and model.layers has 2 blocks"),
        ({"heads_pattern": {"q_proj": 2}}, "heads_pattern key 'q_proj' matches none of the 6 adapted modules"),
        (
            {"heads_pattern": {"up_proj": 2, ".*mlp.*": 3}},
            "heads_pattern gives model.layers.0.mlp.up_proj 2 and 3 heads",
        ),
        ({"num_heads": [2, 3], "target_modules": ["lm_head"]}, "lm_head stands in none .* heads_pattern={'lm_head'"),
    ],
)
def test_settings_that_do_not_fit_the_model_change_nothing(settings, message, tiny_llama):
    base = tiny_llama()
    with pytest.raises((AdapterError, ConfigError), match=message):
        adapted(base, "rlora", **settings)
    assert not any(isinstance(module, BranchLinear) for module in base.modules())


def test_a_file_whose_list_is_too_short_is_refused(tiny_llama, tmp_path):
    adapted(tiny_llama(), "rlora", num_heads=[2, 3]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    words = json.loads(path.read_text())
    for heads, message in (
        ([2], "num_heads has 1 numbers, and model.layers.1.mlp.* stands in block 1"),
        ([3, 3], "asks for"),
        (3, "asks for"),
    ):
        path.write_text(json.dumps(words | {"num_heads": heads}))
        with pytest.raises(AdapterError, match=message):
            check_adapter(tmp_path)
