"""A training on a tiny real model: it learns both tasks, repeats itself exactly, and resumes as if never stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import LlamaForCausalLM

from multiflora.data.prepare import encode_tasks
from multiflora.recipe import Recipe, recipe_from
from multiflora.training.adapter import add_adapter
from multiflora.training.checkpoint import CHECKPOINTS
from multiflora.training.fit import fit, order_examples
from tests.integration.toys import make_recipe, make_tokenizer

TinyLlama = Callable[..., LlamaForCausalLM]


def run(tiny_llama: TinyLlama, recipe: Recipe, **more: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    tokenizer = make_tokenizer()
    model = add_adapter(tiny_llama(vocab_size=len(tokenizer), initializer_range=0.2), recipe)
    _, log = fit(model, tokenizer, recipe, encode_tasks(recipe, tokenizer), quiet=True, **more)
    return get_peft_model_state_dict(model), log


def losses(log: list[dict[str, Any]], name: str) -> list[float]:
    return [line[name] for line in log if name in line]


@pytest.mark.parametrize("method", ["lora", "rlora", "moelora"])
@pytest.mark.parametrize("packing", [False, True])
def test_both_tasks_are_learned(tiny_llama: TinyLlama, tmp_path: Path, method: str, packing: bool) -> None:
    recipe = make_recipe(tmp_path, method, max_steps=40, packing=packing)
    _, log = run(tiny_llama, recipe)
    for task in ("echo", "next"):
        history = losses(log, f"loss/{task}")
        assert len(history) == 4
        assert history[-1] < 0.8 * history[0]


@pytest.mark.parametrize("method", ["lora", "rlora"])
def test_the_same_recipe_gives_the_same_adapter_twice(tiny_llama: TinyLlama, tmp_path: Path, method: str) -> None:
    settings = {"name": method, "lora_dropout": 0.1}
    first, first_log = run(tiny_llama, make_recipe(tmp_path, settings, max_steps=6, log_every=2))
    torch.rand(3)  # whatever else was drawn meanwhile
    second, second_log = run(tiny_llama, make_recipe(tmp_path, settings, max_steps=6, log_every=2))
    assert losses(first_log, "loss/echo") == losses(second_log, "loss/echo")
    assert all(torch.equal(first[name], second[name]) for name in first)
    other, _ = run(tiny_llama, make_recipe(tmp_path, settings, seed=1, max_steps=6))
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_model_that_is_trained_twice_is_computed_in_the_same_type_both_times(
    tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    recipe, tokenizer = make_recipe(tmp_path, "lora", max_steps=4, log_every=1), make_tokenizer()
    base = tiny_llama(vocab_size=len(tokenizer), initializer_range=0.2).to(torch.bfloat16)
    model = add_adapter(base, recipe)
    start = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    logs = []
    for _ in range(2):
        set_peft_model_state_dict(model, start)
        logs.append(fit(model, tokenizer, recipe, encode_tasks(recipe, tokenizer), quiet=True)[1])
    assert losses(logs[0], "loss") == losses(logs[1], "loss")


@pytest.mark.parametrize("method", ["lora", "rlora"])
def test_a_resumed_run_equals_one_that_never_stopped(tiny_llama: TinyLlama, tmp_path: Path, method: str) -> None:
    settings = {"name": method, "lora_dropout": 0.1}
    recipe = make_recipe(tmp_path, settings, max_steps=8, save_every=5, log_every=1)
    whole, whole_log = run(tiny_llama, recipe)
    resumed, resumed_log = run(tiny_llama, recipe, checkpoint=recipe.output / CHECKPOINTS / "checkpoint-5")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert losses(resumed_log, "loss") == losses(whole_log, "loss")


def test_the_model_is_left_without_traces_of_the_training(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, "lora", max_steps=2, bf16=True)  # float32 weights under autocast
    tokenizer = make_tokenizer()
    base = tiny_llama(vocab_size=len(tokenizer))
    model = add_adapter(base, recipe)
    fit(model, tokenizer, recipe, encode_tasks(recipe, tokenizer), quiet=True)
    assert not model.training
    assert not {"forward", "_original_forward"} & vars(model).keys()
    assert "forward" not in vars(base)
    assert model(input_ids=torch.arange(5)[None]).logits.dtype == torch.float32


def test_long_examples_are_counted_and_named(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, "lora", max_length=12)
    examples = encode_tasks(recipe, make_tokenizer())
    assert any(
        note.startswith("next: ") and "longer than train.max_length = 12 tokens" in note for note in examples.notes
    )


def test_shares_follow_the_weights(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, "lora")
    tasks = [
        dict(task.model_dump(mode="json"), weight=weight) for task, weight in zip(recipe.tasks, (3, 1), strict=True)
    ]
    weighted = recipe_from(
        recipe.model_dump(mode="json", exclude_none=True) | {"tasks": tasks, "mixture": {"strategy": "weights"}}
    )
    report = encode_tasks(weighted, make_tokenizer()).take(80).report
    assert report["echo"]["examples"] == pytest.approx(60, abs=10)
    assert report["echo"]["examples"] + report["next"]["examples"] == 80


def test_grouping_mixes_the_tasks_in_every_batch_and_can_be_switched_off(tmp_path: Path) -> None:
    def order(**train: Any) -> Any:
        recipe = make_recipe(tmp_path, "lora", max_steps=16, batch_size=8, **train)
        examples = encode_tasks(recipe, make_tokenizer())
        data = order_examples(recipe, examples)[0].dataset
        return np.array(data["task_id"][:]), np.array(data["example"][:]), examples.mixture.plan(128)

    tasks, grouped, plan = order()
    assert all(set(batch) == {0, 1} for batch in tasks.reshape(-1, 8))
    assert sorted(grouped) == sorted(plan)
    assert grouped.tolist() != plan.tolist()
    assert order(group_by_length=False)[1].tolist() == plan.tolist()
    assert order(packing=True)[1].tolist() == plan.tolist()


def test_by_tasks_each_task_weighs_the_same_however_long_its_answers(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    recipe = make_recipe(
        tmp_path, "lora", max_steps=4, batch_size=4, gradient_accumulation=2, log_every=1, loss="tasks"
    )
    data = order_examples(recipe, encode_tasks(recipe, make_tokenizer()))[0].dataset
    tasks, mass = np.array(data["task_id"][:]), np.array(data["loss_weight"][:]) * np.array(data["loss_tokens"][:])
    tokens = np.array(data["loss_tokens"][:])
    assert tokens[tasks == 1].sum() > 1.1 * tokens[tasks == 0].sum()
    for step in range(4):
        own = slice(8 * step, 8 * step + 8)
        assert mass[own].sum() == pytest.approx(1.0)
        assert mass[own][tasks[own] == 0].sum() == pytest.approx(np.mean(tasks[own] == 0))
    _, log = run(tiny_llama, recipe)
    _, plain = run(
        tiny_llama, make_recipe(tmp_path, "lora", max_steps=4, batch_size=4, gradient_accumulation=2, log_every=1)
    )
    assert len(losses(log, "loss")) == 4
    assert losses(log, "loss") != losses(plain, "loss")
