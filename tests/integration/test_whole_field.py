"""LoSparse and LoraHub as methods of a recipe: trained, saved, read back by another process, compared with LoRA."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerCallback

import multiflora
from multiflora.base_model import load_model
from multiflora.compress.layer import compressed_layers
from multiflora.data.prepare import encode_tasks
from multiflora.errors import ConfigError, EnvironmentProblem, Interrupted
from multiflora.estimate import estimate
from multiflora.evaluation.load import load_target
from multiflora.jobs.lorahub import few_examples, steps_of_tasks
from multiflora.recipe import Recipe
from multiflora.training import fit as fit_module
from multiflora.training.adapter import add_adapter
from multiflora.training.fit import fit
from multiflora.training.precision import weights_of
from tests.integration.toys import make_recipe, make_tokenizer, write_tasks

TinyLlama = Callable[..., LlamaForCausalLM]

LOSPARSE = {"name": "losparse", "low_rank": 0.2, "keep": 0.2, "every": 2}
LORAHUB = {"name": "lorahub", "r": 2, "lora_alpha": 4, "examples": 3, "budget": 6}
BOTH = pytest.mark.parametrize("method", [LOSPARSE, LORAHUB], ids=lambda method: method["name"])


@pytest.fixture
def model_folder(tiny_llama: TinyLlama, tmp_path: Path) -> str:
    folder = tmp_path / "model"
    tokenizer = make_tokenizer()
    tiny_llama(vocab_size=len(tokenizer), initializer_range=0.2, eos_token_id=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def recipe_in(folder: Path, model: str, method: dict[str, Any], **train: Any) -> Recipe:
    folder.mkdir(exist_ok=True)
    return make_recipe(folder, method, model=model, **{"max_steps": 9, "log_every": 1, **train})


@BOTH
def test_another_process_reads_what_was_saved_and_gives_the_same_scores(
    method: dict[str, Any], model_folder: str, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in Path(model_folder).iterdir()}
    made = multiflora.train(recipe_in(tmp_path, model_folder, method), quiet=True)
    assert {path.name: path.read_bytes() for path in Path(model_folder).iterdir()} == before
    words = [sys.executable, "-m", "multiflora", "evaluate", str(made.output), "--limit", "4", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["tasks"] == json.loads(json.dumps(made.results["adapted"]["tasks"]))
    assert made.results["adapted"] != made.results["base"]
    assert not (made.output / "checkpoints").exists()


@BOTH
def test_the_same_recipe_gives_the_same_results_file_twice(
    method: dict[str, Any], model_folder: str, tmp_path: Path
) -> None:
    files = [
        (multiflora.train(recipe_in(tmp_path / place, model_folder, method), quiet=True).output / "results.json")
        for place in ("first", "second")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


@BOTH
def test_a_dry_run_says_what_the_run_then_trains(method: dict[str, Any], model_folder: str, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, model_folder, method)
    told = estimate(recipe)
    made = multiflora.train(recipe, quiet=True).results
    assert (told.trainable, told.parameters) == (made["parameters"]["trainable"], made["parameters"]["total"])
    assert told.steps == max(line["step"] for line in made["training"]["log"])


def test_losparse_leaves_a_smaller_model_and_says_how_much_smaller(model_folder: str, tmp_path: Path) -> None:
    made = multiflora.train(recipe_in(tmp_path, model_folder, LOSPARSE), quiet=True)
    counts = made.results["parameters"]
    model = load_target(made.output).model
    assert counts["base"] == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model_folder).parameters())
    assert counts["saved"] == sum(p.numel() for p in model.parameters()) < counts["base"]
    assert counts["trainable"] > counts["saved"]  # while it trains, S is as large as the weight
    layers = compressed_layers(model).values()
    left = sum(layer.S.numel() for layer in layers)
    assert 0 < left <= 0.2 * sum(layer.in_features * layer.out_features for layer in layers)
    card = (made.output / "README.md").read_text()
    assert "multiflora.load_compressed" in card
    assert f"The saved model has {counts['saved']:,}, {counts['saved'] / counts['base']:.1%} of the base" in card
    # it is made in bfloat16 as well, and what is scored is what is in the folder
    half = recipe_in(tmp_path / "half", model_folder, LOSPARSE).model_dump(mode="json", exclude_none=True)
    half = multiflora.train({**half, "model": {"name": model_folder, "dtype": "bfloat16"}}, quiet=True)
    assert {p.dtype for p in load_target(half.output).model.parameters()} == {torch.bfloat16}
    assert multiflora.evaluate(str(half.output), limit=4, progress=False) == half.results["adapted"]


@pytest.mark.parametrize("method", ["losparse", "full"])
def test_trained_weights_are_analysed_as_what_they_add_to_the_base(
    method: str, model_folder: str, tmp_path: Path
) -> None:
    made = multiflora.train(recipe_in(tmp_path, model_folder, {"name": method}), quiet=True)
    found = multiflora.analyze(made.output, examples=2, draw=False)
    assert len(found.measures["spectra"]) == 14  # seven linear layers in each of two
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    place = "model.layers.0.mlp.up_proj"
    layer = load_target(made.output).model.get_submodule(place)
    weight = layer.dense() if method == "losparse" else layer.weight
    added = weight.detach().float() - base.get_submodule(place).weight
    largest = float(torch.linalg.svdvals(added.detach())[0])
    assert found.measures["spectra"][place]["singular"][0] == pytest.approx(largest, rel=1e-2)


def test_lorahub_s_adapter_is_the_blend_of_loras_that_saw_one_task_each(model_folder: str, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, model_folder, LORAHUB)
    # with autocast, which a second training of one model has to be given anew
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "bfloat16"})})
    made = multiflora.train(recipe, quiet=True)
    told = json.loads((made.output / "composition.json").read_text())
    assert told == made.results["training"]["composition"]
    assert (told["how"], list(told["weights"]), told["evaluations"]) == ("lorahub", ["echo", "next"], 6)
    assert told["loss_after"] < told["loss_before"]
    # nine steps: five for the one task, four for the other, and each log line knows its own task alone
    assert [line["step"] for line in made.results["training"]["log"]] == list(range(1, 10))
    assert ["loss/echo" in line for line in made.results["training"]["log"]] == [True] * 5 + [False] * 4
    mixture = made.results["mixture"]
    assert [mixture[task]["examples"] for task in ("echo", "next")] == [40, 32]
    assert sum(row["share_of_examples"] for row in mixture.values()) == pytest.approx(1)

    tokenizer, wanted = make_tokenizer(), {}
    for task, steps in zip(recipe.tasks, (5, 4), strict=True):
        settings = {"target_modules": "all-linear", "r": 2, "lora_alpha": 4}
        plain = recipe.method.model_copy(update={"name": "lora", "settings": settings})
        train = recipe.train.model_copy(update={"max_steps": steps})
        own = recipe.model_copy(update={"tasks": (task,), "train": train, "method": plain, "output": tmp_path / "one"})
        model = add_adapter(load_model(own.model, weights_of(own)), own)
        fit(model, tokenizer, own, encode_tasks(own, tokenizer), quiet=True)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                part = told["weights"][task.name] * parameter.detach()
                wanted[name.replace(".default", "")] = wanted.get(name.replace(".default", ""), 0) + part
    saved = load_file(made.output / "adapter_model.safetensors")
    assert saved.keys() == wanted.keys()
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6)
    # a stock LoRA of the recipe's rank: peft alone reads it
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), str(made.output))
    config = stock.active_peft_config
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha) == (2, 4)
    assert "put together from one such adapter of each task" in (made.output / "README.md").read_text()


def test_the_few_examples_are_some_of_every_task(model_folder: str, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, model_folder, LORAHUB)
    examples = encode_tasks(recipe, make_tokenizer())
    few = few_examples(examples, 3)
    assert [row.task for row in few] == ["echo"] * 3 + ["next"] * 3
    known = [(row["input_ids"], row["labels"]) for row in examples.store]
    assert all((row.ids, row.labels) in known for row in few)
    assert [row.ids for row in few[:3]] != [row[0] for row in known[:3]]  # drawn, not the first
    assert len(few_examples(examples, 1000)) == len(known)


def test_steps_follow_the_mixture(model_folder: str, tmp_path: Path) -> None:
    plain = recipe_in(tmp_path, model_folder, LORAHUB).model_dump(mode="json", exclude_none=True)
    for task, weight in zip(plain["tasks"], (3.0, 1.0), strict=True):
        task["weight"] = weight
    plain["mixture"] = {"strategy": "weights"}
    examples = encode_tasks(Recipe.model_validate(plain), make_tokenizer())
    assert steps_of_tasks(examples.mixture, 8) == [6, 2]
    with pytest.raises(ConfigError, match="The run has 1 steps for 2 tasks, and lorahub trains a LoRA for each"):
        steps_of_tasks(examples.mixture, 1)


@pytest.mark.parametrize(
    ("more", "train", "message"),
    [
        ({"budget": 0}, {}, r"method.budget is 0; it must be a whole number of at least 1"),
        ({"examples": 2.5}, {}, r"method.examples is 2.5; it must be a whole number of at least 1"),
        ({"use_dora": True}, {}, r"method.use_dora is not a setting of lorahub"),
        ({}, {"save_every": 2}, r"train.save_every is 2, but lorahub trains a LoRA for each task"),
    ],
)
def test_what_lorahub_cannot_do_is_refused_before_anything_is_read(
    more: dict[str, Any], train: dict[str, Any], message: str, tmp_path: Path
) -> None:
    recipe = recipe_in(tmp_path, "no/such-model-is-ever-looked-for", {**LORAHUB, **more}, **train)
    with pytest.raises(ConfigError, match=message):
        multiflora.train(recipe, quiet=True)
    assert not recipe.output.exists()


def test_lorahub_needs_two_tasks_and_linear_layers_and_does_not_resume(model_folder: str, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, model_folder, LORAHUB)
    with pytest.raises(ConfigError, match="but there is one task"):
        multiflora.train(recipe.model_copy(update={"tasks": recipe.tasks[:1]}), quiet=True)
    with pytest.raises(ConfigError, match="A run with method: lorahub cannot be resumed"):
        multiflora.train(recipe, resume=True, quiet=True)
    strange = recipe_in(tmp_path, model_folder, {**LORAHUB, "target_modules": ["embed_tokens", "q_proj"]})
    with pytest.raises(ConfigError, match=r"\['embed_tokens', 'q_proj'\], which names modules that are no linear"):
        multiflora.train(strange, quiet=True)
    assert not recipe.output.exists()


def test_without_nevergrad_lorahub_ends_before_it_reads_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    recipe = recipe_in(tmp_path, "no/such-model-is-ever-looked-for", LORAHUB)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'multiflora\[compose\]'"):
        multiflora.train(recipe, quiet=True)


class Stop(TrainerCallback):
    """Asks the run to stop after a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_stopped_lorahub_can_be_started_again(
    model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_in(tmp_path, model_folder, LORAHUB)
    trainer = fit_module.MultitaskTrainer
    with_it = lambda **words: trainer(**words | {"callbacks": [Stop(), *words["callbacks"]]})  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(fit_module, "MultitaskTrainer", with_it)
        with pytest.raises(Interrupted, match=r"while it trained the LoRA of echo\. lorahub cannot go on from there"):
            multiflora.train(recipe, quiet=True)
    assert (multiflora.train(recipe, quiet=True).output / "adapter_model.safetensors").exists()


def test_a_comparison_takes_both_beside_lora(model_folder: str, tmp_path: Path) -> None:
    plan = {
        "model": model_folder,
        "tasks": write_tasks(tmp_path / "tasks"),
        "train": {"max_steps": 4, "batch_size": 4, "max_length": 40, "log_every": 1},
        "evaluate": {"limit": 2, "batch_size": 4},
        "output": str(tmp_path / "out"),
        "compare": {"methods": [{"lora": {"r": 2}}, LOSPARSE, {"name": "lorahub", "examples": 2, "budget": 3}]},
    }
    plan["compare"] |= {"seeds": 1, "shared": {"target_modules": "all-linear"}}
    found = multiflora.compare(plan, quiet=True)
    lora, losparse, lorahub = found.rows
    assert lorahub.parameters == lora.parameters  # those of the LoRA that results
    assert (lora.rank, lorahub.rank, losparse.rank) == (2, 2, None)
    assert losparse.parameters > 10 * lora.parameters
    cells = [json.loads(path.read_text()) for path in (tmp_path / "out" / "cells").glob("*.json")]
    trained = {cell["label"]: cell for cell in cells if cell["kind"] == "seed"}
    for row in found.rows:
        assert trained[row.label]["parameters"]["trainable"] == row.parameters
        assert trained[row.label]["latency"]["with"] > 0
    assert "losparse" in found.answer
    assert "lorahub" in multiflora.report(tmp_path / "out").page.read_text()
