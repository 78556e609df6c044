"""Sums of LoRAs are exact; LoraHub's weights find the LoRA that fits the examples."""

from __future__ import annotations

import json

import pytest
import torch
from made_adapters import adapted, save
from peft import PeftModel
from safetensors.torch import load_file
from test_export_lora import IDS, logits_of

import multiflora
from multiflora import ConfigError, ExportError
from multiflora.estimate import estimate
from multiflora.export.compose import compose
from multiflora.export.saved import open_adapter
from multiflora.methods import build_config
from multiflora.recipe import recipe_from
from tests.integration.toys import make_recipe, make_tokenizer


def update_of(model):
    """ΔW of every adapted layer."""
    return {
        name: module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def test_the_sum_is_exact_whatever_the_ranks_and_kinds(tiny_llama, tmp_path):
    models = [
        adapted("lora", tiny_llama(), r=2, lora_alpha=7, target_modules=["up_proj", "q_proj"]),
        adapted("mlora", tiny_llama(), target_modules=["up_proj", "down_proj"]),
    ]
    folders = [save(model, tmp_path / str(i)) for i, model in enumerate(models)]
    weights = [0.5, -1.25]
    made = compose(folders, tmp_path / "sum", weights=weights)
    assert made.how == "sum"
    both = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "sum")).eval()
    found, parts = update_of(both), [update_of(model) for model in models]
    assert found.keys() == parts[0].keys() | parts[1].keys()
    for name, delta in found.items():
        wanted = sum(w * part[name] for w, part in zip(weights, parts, strict=True) if name in part)
        assert torch.allclose(delta, wanted, atol=1e-5), name


def test_lorahub_finds_the_lora_the_examples_come_from(tiny_llama, tmp_path):
    pytest.importorskip("nevergrad")
    tiny_llama().save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    folders = []
    for i in range(2):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model = adapted("lora", base, r=2, lora_alpha=2, target_modules=["up_proj", "down_proj", "v_proj"])
        torch.manual_seed(10 + i)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.4)
        folders.append(save(model, tmp_path / str(i)))
    with torch.no_grad():  # what the second one says
        told = logits_of(model).argmax(-1)
    rows = [
        {"input_ids": row.tolist(), "labels": [-100, *said[:-1].tolist()]} for row, said in zip(IDS, told, strict=True)
    ]
    made = compose(folders, tmp_path / "hub", examples=rows, budget=30, tokenizer="none")
    assert made.loss_after < made.loss_before
    assert made.weights[1] > abs(made.weights[0])
    assert all(abs(weight) <= 1.5 for weight in made.weights)
    assert json.loads((tmp_path / "hub/composition.json").read_text())["how"] == "lorahub"
    again = compose(folders, tmp_path / "again", examples=rows, budget=30, tokenizer="none")
    assert again.weights == made.weights
    # both factors carry the weights: the product has cross terms
    written = load_file(tmp_path / "hub/adapter_model.safetensors")
    each = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    for key, tensor in written.items():
        wanted = sum(w * part[key] for w, part in zip(made.weights, each, strict=True))
        assert torch.allclose(tensor, wanted, atol=1e-6), key


def test_lorahub_improves_on_every_single_lora_where_the_examples_need_two(tiny_llama, tmp_path):
    pytest.importorskip("nevergrad")
    from transformers import AutoModelForCausalLM

    from multiflora.export.examples import read_examples
    from multiflora.export.few_shot import FewShotLoss, with_lora
    from multiflora.export.lorahub import blend
    from multiflora.export.plain import read_lora

    tiny_llama().save_pretrained(tmp_path / "base")
    folders = []
    for i in range(2):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model = adapted("lora", base, r=2, lora_alpha=2, target_modules=["up_proj", "down_proj", "v_proj"])
        torch.manual_seed(10 + i)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                # each one has learned something in a layer of its own
                parameter.data.normal_(std=0.5 if f"layers.{i}." in name else 0.0)
        folders.append(save(model, tmp_path / str(i)))
    loras = [read_lora(folder) for folder in folders]
    each = [list(lora.pairs()) for lora in loras]
    stacked = {
        one.name: (torch.stack([one.A, two.A]), torch.stack([one.B, two.B])) for one, two in zip(*each, strict=True)
    }

    def loss_on(examples):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        return FewShotLoss(with_lora(base, loras[0].config, each[0]), examples)

    both = loss_on(read_examples([{"input_ids": [1, 2], "labels": [-100, 2]}], None))
    both(blend(stacked, [1.0, 1.0]))
    with torch.no_grad():  # what both of them say together
        told = both.model(IDS).logits.argmax(-1)
    rows = [
        {"input_ids": row.tolist(), "labels": [-100, *said[:-1].tolist()]} for row, said in zip(IDS, told, strict=True)
    ]
    made = compose(folders, tmp_path / "hub", examples=rows, budget=40, tokenizer="none")
    loss = loss_on(read_examples(rows, None))
    alone = min(
        loss(blend(stacked, [w, 0.0] if i == 0 else [0.0, w]))
        for i in range(2)
        for w in (-1.5, -1.0, -0.5, 0.5, 1, 1.5)
    )
    assert made.loss_after < alone < made.loss_before
    assert all(abs(weight) > 0.3 for weight in made.weights)


def test_what_cannot_be_put_together_is_refused(tiny_llama, tmp_path):
    small = save(adapted("lora", tiny_llama(), r=2), tmp_path / "small")
    large = save(adapted("lora", tiny_llama(), r=3), tmp_path / "large")
    tasks = save(adapted("moelora", tiny_llama()), tmp_path / "tasks")
    full = save(adapted("lora", tiny_llama(), modules_to_save=["norm"]), tmp_path / "full")
    out, rows = tmp_path / "out", [{"input_ids": [1, 2, 3]}]
    with pytest.raises(ExportError, match=r"small and .*large differ in layers or ranks"):
        compose([small, large], out, examples=rows, tokenizer="none")
    with pytest.raises(ExportError, match=r"one update for each task \(sums, labels\)"):
        compose([small, tasks], out)
    with pytest.raises(ExportError, match=r"full holds .*norm.* besides its layers"):
        compose([small, full], out)
    with pytest.raises(ConfigError, match="There is 1 adapter to compose"):
        compose([small], out)
    with pytest.raises(ConfigError, match="2 adapters and 3 weights"):
        compose([small, large], out, weights=[1, 2, 3])
    with pytest.raises(ConfigError, match="weights and examples are both given"):
        compose([small, large], out, weights=[1, 2], examples=rows)
    assert not out.exists()


def experts(tiny_llama, folder):
    """Two LoRAs of different ranks and layers on disk, and their models."""
    models = [
        adapted("lora", tiny_llama(), r=2, lora_alpha=7, target_modules=["up_proj", "q_proj"]),
        adapted("lora", tiny_llama(), r=3, lora_alpha=3, target_modules=["up_proj", "down_proj"]),
    ]
    return models, [save(model, folder / str(i)) for i, model in enumerate(models)]


def test_a_fresh_router_is_the_mean_of_the_experts_that_it_holds(tiny_llama, tmp_path):
    models, folders = experts(tiny_llama, tmp_path)
    made = compose(folders, tmp_path / "routed", routed=True)
    assert (made.how, made.weights) == ("route", (0.5, 0.5))
    compose(folders, tmp_path / "mean", weights=[0.5, 0.5])
    found = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "routed"), is_trainable=True).eval()
    mean = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "mean")).eval()
    assert torch.allclose(logits_of(found), logits_of(mean), atol=1e-5)
    held = {layer.name: layer for layer in open_adapter(tmp_path / "routed").layers()}
    updates = [update_of(model) for model in models]
    assert {f"base_model.model.{name}" for name in held} == updates[0].keys() | updates[1].keys()
    for name, layer in held.items():
        for A, B, update in zip(layer.parts["A"].split(3), layer.parts["B"].split(3, 1), updates, strict=True):
            delta = update.get(f"base_model.model.{name}", torch.zeros(len(B), A.shape[1]))
            assert torch.allclose(layer.scale * B @ A, delta, atol=1e-6), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_the_router_is_trained_whoever_sets_gradients(tiny_llama, tmp_path, dtype):
    _, folders = experts(tiny_llama, tmp_path)
    compose(folders, tmp_path / "routed", routed=True)
    # of a base in bfloat16 peft makes the adapter's tensors anew, in float32
    model = PeftModel.from_pretrained(tiny_llama().to(dtype), str(tmp_path / "routed"), is_trainable=True)

    def trained():
        return {name.partition("mf_parts_")[2] for name, p in model.named_parameters() if p.requires_grad}

    assert trained() == {"router.default"}
    model.set_requires_grad("default", False)
    assert not trained()
    model.set_requires_grad("default", True)
    assert trained() == {"router.default"}
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    assert trained() == {"router.other"}
    model.delete_adapter("other")
    model.set_adapter("default")
    assert trained() == {"router.default"}


def test_a_router_over_trained_loras_learns_by_a_recipe(tiny_llama, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_llama(vocab_size=len(tokenizer), initializer_range=0.2, eos_token_id=1).save_pretrained(tmp_path / "model")
    whole = make_recipe(tmp_path, "lora", model=str(tmp_path / "model"), max_steps=6, learning_rate=0.02, log_every=1)
    words = whole.model_dump(mode="json", exclude_none=True)
    words["evaluate"] |= {"before": False}
    folders = []
    for task in words["tasks"]:
        output = str(tmp_path / "loras" / task["name"])
        folders.append(multiflora.train(recipe_from({**words, "tasks": [task], "output": output}), quiet=True).output)
    made = compose(folders, tmp_path / "routed", routed=True)
    again = {**words, "method": dict(made.method), "output": str(tmp_path / "trained")}
    with pytest.raises(ConfigError, match=r"method\.frozen holds 'B', and the heads B start at zero"):
        estimate(recipe_from(again))
    asked = recipe_from({**again, "init_from": str(tmp_path / "routed")})
    start = load_file(tmp_path / "routed/adapter_model.safetensors")
    routers = sum(tensor.numel() for name, tensor in start.items() if name.endswith("router"))
    assert estimate(asked).trainable == routers
    run = multiflora.train(asked, quiet=True)
    losses = [line["loss"] for line in run.log if "loss" in line]
    assert losses[-1] < losses[0]
    learned = load_file(run.output / "adapter_model.safetensors")
    assert learned.keys() == start.keys()
    for name, tensor in learned.items():
        assert torch.equal(tensor, start[name]) != name.endswith("router"), name
    # and what was frozen may learn later
    more = {**again, "init_from": str(run.output), "output": str(tmp_path / "more")}
    del more["method"]["frozen"]
    assert estimate(recipe_from(more)).trainable > routers


def test_what_cannot_be_routed_is_refused(tiny_llama, tmp_path):
    _, folders = experts(tiny_llama, tmp_path)
    with pytest.raises(ConfigError, match="route and weights are both given"):
        compose(folders, tmp_path / "no", routed=True, weights=[1.0, 1.0])
    wide = save(adapted("lora", tiny_llama(hidden_size=64), r=2, target_modules=["up_proj"]), tmp_path / "wide")
    with pytest.raises(ConfigError, match=r"up_proj is 64 -> 48 in .*wide and 32 -> 48 in the adapters before it"):
        compose([folders[0], wide], tmp_path / "no", routed=True)
    assert not (tmp_path / "no").exists()
    with pytest.raises(ConfigError, match="frozen holds 'C', and the tensors of these parts are A, B, router"):
        build_config("parts", {"stem": "own", "frozen": ["C"]})
    with pytest.raises(ConfigError, match="so nothing would be trained"):
        build_config("parts", {"stem": "own", "frozen": ["router", "B", "A"]})
