"""The main job on the command line: what it prints, what it leaves, and that the dry run told the truth."""

from __future__ import annotations

import json
from pathlib import Path

from .parts import Command


def test_from_recipe_to_table_and_back(installed: Command, multiflora: Command, recipe: Path) -> None:
    said = multiflora("train", "recipe.yaml", "--dry-run", "--json")
    assert said.code == 0, said.err
    told = json.loads(said.out)
    assert not recipe.with_name("run").exists()

    ended = installed("train", "recipe.yaml", "--json")
    assert ended.code == 0, ended.err
    done = json.loads(ended.out)
    run = Path(done.pop("output"))
    assert run == recipe.with_name("run")
    assert done == json.loads((run / "results.json").read_text("utf-8"))
    assert {"adapter_model.safetensors", "adapter_config.json", "recipe.yaml", "run.json", "README.md"} <= {
        path.name for path in run.iterdir()
    }
    assert "loss" in ended.err

    # what the dry run told without a weight is what the run then had
    assert (told["trainable"], told["parameters"]) == (done["parameters"]["trainable"], done["parameters"]["total"])
    assert told["mixture"] == done["mixture"]
    assert told["steps"] == 2
    assert told["tokens_per_step"] == sum(task["tokens"] for task in done["mixture"].values()) / 2
    assert told["memory"]["gradients"] == 4 * done["parameters"]["trainable"]
    assert told["recipe"]["output"] == str(run)

    scored = multiflora("evaluate", "run", "--limit", "2", "--json")
    assert scored.code == 0, scored.err
    assert json.loads(scored.out) == done["adapted"]


def test_overrides_and_another_output_folder(multiflora: Command, recipe: Path) -> None:
    words = ["--set", "train.max_steps=1", "--set", "method={name: lora, r: 4}", "--set", "evaluate.before=false"]
    ended = multiflora("train", "recipe.yaml", *words, "--output", "elsewhere/run")
    assert ended.code == 0, ended.err
    assert "macro average" in ended.out
    assert f"Saved in {recipe.with_name('elsewhere') / 'run'}" in ended.out
    written = recipe.with_name("elsewhere") / "run"
    assert json.loads((written / "adapter_config.json").read_text("utf-8"))["peft_type"] == "LORA"
    assert "max_steps: 1" in (written / "recipe.yaml").read_text("utf-8")
    assert not recipe.with_name("run").exists()


def test_a_dry_run_for_a_person(multiflora: Command, recipe: Path) -> None:
    ended = multiflora("train", "recipe.yaml", "--dry-run")
    assert ended.code == 0, ended.err
    for words in ("max_steps: 2", "2 x model.layers.*.mlp.down_proj", "trainable parameters", "memory", "roses"):
        assert words in ended.out


def test_examples_of_a_recipe_with_the_tokens_of_its_model(multiflora: Command, recipe: Path) -> None:
    ended = multiflora("tasks", "show", "roses", "--recipe", "recipe.yaml", "--count", "1")
    assert ended.code == 0, ended.err
    assert "⟦<end>⟧" in ended.out  # the end of text carries loss as well
    assert ended.out.count("⟦") > 2  # every token of the answer in brackets of its own
    assert "roses" in ended.out
