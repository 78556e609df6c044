"""A recipe for a mixture of experts: what is said of its experts, and a training of them from dry run to scores."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import MIXTURES, mixture
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import multiflora
from multiflora.adapter_folder import load_adapter
from multiflora.base_model import load_model
from multiflora.comparison.plan import plan_of
from multiflora.comparison.spec import load_comparison
from multiflora.errors import AdapterError, ConfigError, ExportError
from multiflora.estimate import estimate
from multiflora.methods.fused import LEFT_OUT
from multiflora.recipe import Recipe
from multiflora.training.adapter import add_adapter
from multiflora.training.init_from import start_from
from tests.integration.toys import make_recipe, make_tokenizer


@pytest.fixture
def folder_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Saves a tiny mixture with the toy tasks' tokenizer."""

    def save(kind: str) -> str:
        tokenizer = make_tokenizer()
        monkeypatch.setattr(MIXTURES[kind], "vocab_size", len(tokenizer))
        folder = tmp_path / "model"
        mixture(kind).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


def left_out_of(recipe: Recipe) -> list[str]:
    return [note for note in estimate(recipe).notes if note.startswith(LEFT_OUT)]


@pytest.mark.parametrize(("method", "kind"), [("rlora", "mixtral"), ("lora", "gpt-oss")])
def test_a_run_says_that_experts_are_left_out(
    method: str, kind: str, folder_of: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make_recipe(tmp_path, {"name": method, "r": 2}, model=folder_of(kind), max_steps=1)
    (told,) = left_out_of(recipe)
    with caplog.at_level(logging.WARNING):
        made = multiflora.train(recipe, quiet=True)
    assert told in caplog.messages
    assert f"- {told}" in (made.output / "README.md").read_text("utf-8")


def test_nothing_is_said_where_modules_were_named_or_experts_are_adapted(
    folder_of: Callable[[str], str], tmp_path: Path
) -> None:
    model = folder_of("mixtral")
    assert not left_out_of(make_recipe(tmp_path, {"name": "rlora", "target_modules": ["q_proj"]}, model=model))
    # peft's LoRA takes all-linear on this model as it was when its experts were linear layers
    assert not left_out_of(make_recipe(tmp_path, {"name": "lora", "r": 2}, model=model))


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize(("method", "modules"), [("rlora", "all-linear"), ("moelora", "none"), ("loramoe", "none")])
def test_experts_are_trained_saved_and_scored(
    method: str, modules: str, folder_of: Callable[[str], str], tmp_path: Path
) -> None:
    settings = {"name": method, "r": 8, "target_parameters": EXPERTS} | (
        {"target_modules": []} if modules == "none" else {}
    )
    recipe = make_recipe(tmp_path, settings, model=folder_of("mixtral"), max_steps=4, log_every=1)
    told = estimate(recipe)
    assert not any(note.startswith(LEFT_OUT) for note in told.notes)
    assert told.modules["model.layers.*.mlp.experts.gate_up_proj"] == 2
    made = multiflora.train(recipe, quiet=True)
    counts = made.results["parameters"]
    assert (told.trainable, told.parameters) == (counts["trainable"], counts["total"])
    saved = load_file(made.output / "adapter_model.safetensors")
    numbers = {name: tensor.numel() for name, tensor in saved.items() if not name.endswith(("_A0", "_B0"))}
    assert sum(numbers.values()) == counts["trainable"]
    of_experts = sum(number for name, number in numbers.items() if ".experts." in name)
    assert of_experts > counts["trainable"] / 2
    assert f"{counts['trainable']:,}" in (made.output / "README.md").read_text("utf-8")
    losses = [line["loss"] for line in made.results["training"]["log"] if "loss" in line]
    assert losses[-1] < losses[0]
    assert multiflora.evaluate(str(made.output), limit=4, progress=False) == made.results["adapted"]


def test_pefts_own_lora_of_experts_is_trained_saved_and_scored(folder_of: Callable[[str], str], tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, {"name": "lora", "r": 2}, model=folder_of("mixtral"), max_steps=2)
    told = estimate(recipe)
    assert told.modules["model.layers.*.mlp.experts.down_proj"] == 2
    made = multiflora.train(recipe, quiet=True)
    counts = made.results["parameters"]
    assert (told.trainable, told.parameters) == (counts["trainable"], counts["total"])
    assert multiflora.evaluate(str(made.output), limit=4, progress=False) == made.results["adapted"]
    damaged = load_file(made.output / "adapter_model.safetensors")
    cut = next(name for name in damaged if ".experts." in name and name.endswith("lora_A.weight"))
    save_file(damaged | {cut: damaged[cut][:3].clone()}, made.output / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"experts.*asks for rank 2"):
        load_adapter(mixture("mixtral"), made.output)


def test_a_training_goes_on_with_the_tasks_in_another_order(folder_of: Callable[[str], str], tmp_path: Path) -> None:
    settings = {"name": "mtllora", "r": 4, "target_modules": [], "target_parameters": EXPERTS}
    first = make_recipe(tmp_path, settings, model=folder_of("mixtral"), max_steps=2)
    multiflora.train(first, quiet=True)
    turned = first.model_copy(update={"tasks": first.tasks[::-1], "init_from": first.output})
    model = put_on_fresh(turned)
    start_from(model, turned)
    was = load_file(first.output / "adapter_model.safetensors")
    now = get_peft_model_state_dict(model)
    for name, tensor in was.items():
        by_task = name.endswith(("task_matrix", "task_logits"))  # (experts, tasks, ...)
        assert torch.equal(now[name], tensor.flip(1) if by_task else tensor), name
    assert any(name.endswith("task_logits") for name in was)


def put_on_fresh(recipe: Recipe) -> Any:
    return add_adapter(load_model(recipe.model, torch.float32), recipe)


def test_what_is_written_of_linear_layers_alone_is_refused(folder_of: Callable[[str], str], tmp_path: Path) -> None:
    settings = {"name": "multilora", "r": 2, "target_parameters": EXPERTS}
    recipe = make_recipe(tmp_path, settings, model=folder_of("mixtral"), max_steps=1)
    made = multiflora.train(recipe, quiet=True)
    with pytest.raises(ExportError, match=r"fused experts.*merge it in Python: model\.merge_and_unload"):
        multiflora.to_lora(str(made.output), tmp_path / "lora")
    found = multiflora.analyze(made.output, examples=2, draw=False).measures
    assert "branches of fused experts are left out" in " ".join(found["notes"])
    words = recipe.model_dump(mode="json", exclude_none=True, include={"model", "tasks"})
    words |= {"output": str(tmp_path / "compared")}
    shared = {"target_modules": ["q_proj", "v_proj"]}
    compared = {"methods": [{"name": "rlora", "target_parameters": EXPERTS}, "lora"], "shared": shared}
    with pytest.raises(ConfigError, match=r"compare: rlora has target_parameters.*linear layers alone"):
        plan_of(load_comparison({**words, "compare": compared}))
    compared = {"methods": ["lora", "rlora"]}
    with pytest.raises(ConfigError, match=r"takes the experts of this mixture along.*Name modules of attention"):
        plan_of(load_comparison({**words, "compare": compared}))
    assert len(plan_of(load_comparison({**words, "compare": {**compared, "shared": shared}}))) == 2
