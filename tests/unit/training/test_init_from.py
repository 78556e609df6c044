"""A training that starts from an earlier adapter: it computes the same, task by task, or is refused by its setting."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from multiflora.context import task
from multiflora.errors import ConfigError
from multiflora.methods import METHODS
from multiflora.recipe import Recipe
from multiflora.training.adapter import adapted_on_meta, add_adapter, probe, save_adapter, start_of
from multiflora.training.hooks import MethodCallback
from multiflora.training.init_from import check_earlier, start_from
from tests.integration.toys import make_recipe

TinyLlama = Callable[..., LlamaForCausalLM]


def learned(model: Any) -> Any:
    """The model after whatever a training may do to it."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn_like(weight)
    return model


def earlier(folder: Path, base: LlamaForCausalLM, method: Any) -> tuple[Any, Recipe]:
    """A model with an adapter that has learned, saved to ``folder/run``, and its recipe."""
    recipe = make_recipe(folder, method)
    model = add_adapter(base, recipe)
    start = start_of(model)
    learned(model)
    save_adapter(model, recipe.output, start=start)
    return model, recipe


def later(folder: Path, method: Any, **changes: Any) -> Recipe:
    """The recipe that goes on from ``folder/run``."""
    return make_recipe(folder, method).model_copy(
        update={"init_from": folder / "run", "output": folder / "later", "seed": 7, **changes}
    )


FROM_A_SAVED_ONE = [
    name
    for name, card in METHODS.items()
    if card.trains in ("adapter", "prompt") and name not in ("pissa", "adalora", "ptuning", "lorahub")
]


@pytest.mark.parametrize("method", FROM_A_SAVED_ONE)
def test_the_start_computes_what_the_earlier_adapter_did(tiny_llama: TinyLlama, tmp_path: Path, method: str) -> None:
    words = {"name": method, **({"init_weights": True} if method == "parts" else {})}
    before, _ = earlier(tmp_path, tiny_llama(), words)
    recipe = later(tmp_path, words)
    model = add_adapter(tiny_llama(), recipe)
    expected = probe(before)
    assert not torch.allclose(probe(model), expected, atol=1e-3)
    found = start_from(model, recipe)
    assert found is not None
    assert found.fresh_tasks == ()
    assert probe(model).equal(expected)


def test_what_belongs_to_a_task_goes_to_the_task_of_that_name(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    before, first = earlier(tmp_path, tiny_llama(), "mtllora")
    echo, following = first.tasks
    other = echo.model_copy(update={"name": "other"})
    recipe = later(tmp_path, "mtllora", tasks=(following, other, echo))
    model = add_adapter(tiny_llama(), recipe)
    fresh = {name: weight.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    found = start_from(model, recipe)
    assert found is not None
    assert found.fresh_tasks == ("other",)
    assert found.to_dict()["tasks"] == ["echo", "next"]
    assert "does not know other, which start fresh" in found.words()
    ids = torch.arange(1, 9)[None]
    for name in ("echo", "next"):
        with task(before, name), task(model, name):
            assert torch.allclose(model.eval()(input_ids=ids).logits, before.eval()(input_ids=ids).logits, atol=1e-5)
    for name, weight in model.named_parameters():
        if name.endswith(("task_matrix.default", "task_logits.default")):
            assert weight[1].equal(fresh[name][1])
            assert not weight[0].equal(fresh[name][0])


def test_a_task_that_is_no_longer_trained_on_is_left_behind(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    _, first = earlier(tmp_path, tiny_llama(), "moelora")
    recipe = later(tmp_path, "moelora", tasks=first.tasks[1:])
    assert start_from(add_adapter(tiny_llama(), recipe), recipe) is not None


def test_what_was_learned_is_no_fresh_start_for_the_callbacks(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    earlier(tmp_path, tiny_llama(), "loraga")
    recipe = later(tmp_path, "loraga")
    model = add_adapter(tiny_llama(), recipe)
    assert MethodCallback(model)._fresh == {"default"}
    start_from(model, recipe)
    assert MethodCallback(model)._fresh == set()


def test_nothing_is_done_where_nothing_is_asked_for(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, "lora")
    model = add_adapter(tiny_llama(), recipe)
    before = probe(model)
    assert start_from(model, recipe) is None
    assert probe(model).equal(before)


@pytest.mark.parametrize(
    ("had", "has", "message"),
    [
        ("hydralora", "rlora", "holds an adapter of hydralora, but method is rlora; .* Set method to hydralora"),
        ("lora", "ia3", "holds an adapter of lora, but method is ia3"),
        ({"name": "lora", "r": 4}, "lora", r"whose adapter has r = 4 \(here 8\); .* Give method.r that value"),
        ("lora", "dora", r"use_dora = False \(here True\)"),
        (
            "mtllora",
            {"name": "mtllora", "temperature": 1.0, "num_heads": 2},
            r"num_heads = 3 \(here 2\), temperature = 0.1 \(here 1.0\)",
        ),
        ("lora", {"name": "lora", "target_modules": ["q_proj"]}, "on other modules: it lacks 0 of the 4 tensors here"),
        ({"name": "lora", "target_modules": ["q_proj"]}, "lora", "it lacks 24 of the 28 tensors here and has 0 others"),
    ],
)
def test_another_method_or_shape_is_refused_by_the_setting(
    tiny_llama: TinyLlama, tmp_path: Path, had: Any, has: Any, message: str
) -> None:
    earlier(tmp_path, tiny_llama(), had)
    recipe = later(tmp_path, has)
    with pytest.raises(ConfigError, match=f"init_from is {tmp_path}/run, .*{message}"):
        start_from(add_adapter(tiny_llama(), recipe), recipe)


def test_what_only_acts_while_training_may_differ(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    before, _ = earlier(tmp_path, tiny_llama(), "rlora")
    recipe = later(tmp_path, {"name": "rlora", "lora_dropout": 0.3, "head_dropout": 0.1, "router_z_loss": 0.1})
    model = add_adapter(tiny_llama(), recipe)
    start_from(model, recipe)
    assert probe(model).equal(probe(before))


def test_another_base_model_is_refused_by_its_sizes_and_told_by_its_name(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    earlier(tmp_path, tiny_llama(), "lora")
    recipe = later(tmp_path, "lora")
    with pytest.raises(ConfigError, match=r"has shape \(48, 8\); expected \(64, 8\)\. It was trained on another base"):
        start_from(add_adapter(tiny_llama(intermediate_size=64), recipe), recipe)
    path = tmp_path / "run" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "somebody/else"}))
    found = start_from(add_adapter(tiny_llama(), recipe), recipe)
    assert found is not None
    assert found.words().endswith("it was trained on another base model, somebody/else")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("full", r"method is full, which trains the model itself. Name the folder .* \(model: FOLDER\)"),
        ("losparse", "method is losparse, which makes a new, smaller model"),
        ("lorahub", "method is lorahub, which trains a LoRA of its own for each task"),
        ("adalora", "method is adalora, which begins with all its directions"),
        ("ptuning", "method is ptuning, which saves what its network gives"),
        ({"name": "prefix", "prefix_projection": True}, "method is prefix, which saves what its network gives"),
        ("pissa", "method is pissa, which takes its start off the base weights.* go on with method lora"),
    ],
)
def test_methods_without_an_adapter_to_go_on_from_are_refused(
    tiny_llama: TinyLlama, tmp_path: Path, method: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_earlier(tiny_llama(), later(tmp_path, method))


def test_a_folder_without_an_adapter_is_refused(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    recipe = later(tmp_path, "lora")
    with pytest.raises(ConfigError, match=f"init_from: {tmp_path}/run does not exist"):
        check_earlier(add_adapter(tiny_llama(), recipe), recipe)


def test_tensors_of_tasks_without_names_are_refused(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    earlier(tmp_path, tiny_llama(), "mtllora")
    path = tmp_path / "run" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_names": None}))
    recipe = later(tmp_path, "mtllora")
    with pytest.raises(ConfigError, match="has tensors for each task but does not name its tasks"):
        start_from(add_adapter(tiny_llama(), recipe), recipe)


@pytest.mark.parametrize("method", ["lora", "moelora", "prompt"])
def test_shapes_without_values_suffice_to_look(tiny_llama: TinyLlama, tmp_path: Path, method: str) -> None:
    base = tiny_llama()
    base.save_pretrained(tmp_path / "model")
    earlier(tmp_path, base, method)
    recipe = later(tmp_path, method)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": str(tmp_path / "model")})})
    assert check_earlier(adapted_on_meta(recipe), recipe) is not None
