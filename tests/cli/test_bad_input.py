"""Bad input on the command line: one paragraph that says what to mend, exit code 2, nothing lost."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from .parts import Command, Ended, write_task


def refused(ended: Ended, *words: str) -> None:
    """Check that a command was refused in one paragraph with all of these words, and left stdout alone."""
    assert ended.code == 2, ended.err
    assert ended.out == ""
    assert "Traceback" not in ended.err
    said = ended.err[ended.err.index("Error: ") :]
    for word in words:
        assert word in said, said


def change(recipe: Path, old: str, new: str) -> None:
    text = recipe.read_text("utf-8")
    assert old in text
    recipe.write_text(text.replace(old, new), "utf-8")


def test_a_missing_recipe(installed: Command) -> None:
    refused(installed("train", "absent.yaml"), "absent.yaml does not exist", "Check the path")


def test_a_missing_data_file(multiflora: Command, recipe: Path) -> None:
    recipe.with_name("roses.jsonl").unlink()
    refused(multiflora("train", "recipe.yaml"), "roses.jsonl", "does not exist")


def test_a_malformed_line_is_named_by_file_and_number(multiflora: Command, recipe: Path) -> None:
    data = recipe.with_name("roses.jsonl")
    lines = data.read_text("utf-8").splitlines()
    lines[16] = lines[16][:-3]
    data.write_text("\n".join(lines) + "\n", "utf-8")
    refused(multiflora("train", "recipe.yaml"), "roses.jsonl", "line 17")


def test_a_template_that_names_a_missing_column(multiflora: Command, recipe: Path) -> None:
    task = '{name: roses, source: roses.jsonl, prompt: "{{ quesion }}", choices: choices, answer: answer}'
    change(recipe, "tasks: [roses.jsonl, tulips.jsonl]", f"tasks: [{task}, tulips.jsonl]")
    refused(multiflora("train", "recipe.yaml"), "quesion", "prompt, choices, answer, completion")


def test_an_empty_task(multiflora: Command, recipe: Path) -> None:
    recipe.with_name("tulips.jsonl").write_text("", "utf-8")
    refused(multiflora("train", "recipe.yaml"), "tulips.jsonl", "no rows")


def test_a_task_whose_condition_keeps_nothing(multiflora: Command, recipe: Path) -> None:
    change(recipe, "tulips.jsonl]", "{name: tulips, source: tulips.jsonl, keep: answer > 5}]")
    refused(multiflora("train", "recipe.yaml"), "tulips.jsonl", "the task is empty", "(answer > 5)", "Mend 'keep'")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("name: rlora", "name: rlor", ["method", "'rlor'", "did you mean rlora?"]),
        ("num_heads: 2", "num_head: 2", ["num_head", "did you mean num_heads?"]),
        ("max_steps: 2", "max_step: 2", ["train.max_step", "did you mean max_steps?"]),
        ("model:", "modl:", ["modl", "did you mean model?"]),
        ("batch_size: 4", "batch_size: none", ["train.batch_size", "'none'"]),
        ("tasks: [roses.jsonl", "tasks: [gsm8", ["'gsm8'", "did you mean gsm8k?"]),
    ],
    ids=["method", "setting", "nested key", "key", "value", "task"],
)
def test_an_unknown_word_gets_the_nearest(
    multiflora: Command, recipe: Path, old: str, new: str, words: list[str]
) -> None:
    change(recipe, old, new)
    refused(multiflora("train", "recipe.yaml"), *words)


def test_all_problems_of_a_recipe_are_told_at_once(multiflora: Command, recipe: Path) -> None:
    change(recipe, "max_steps: 2", "max_step: 2")
    change(recipe, "batch_size: 4", "batch_size: 0")
    refused(multiflora("train", "recipe.yaml"), "recipe.yaml has 2 problems", "train.max_step", "train.batch_size")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "train.learning_rate"], "has no '='"),
        (["--set", "train.learning_rat=1e-4"], "did you mean learning_rate?"),
        (["--set", "tasks.7.weight=2"], "'7' is not a position"),
    ],
    ids=["no value", "unknown key", "no such task"],
)
def test_a_bad_override(multiflora: Command, recipe: Path, words: list[str], said: str) -> None:
    refused(multiflora("train", "recipe.yaml", *words), said)


def test_an_output_folder_that_holds_a_run_is_left_as_it_is(multiflora: Command, recipe: Path) -> None:
    held = recipe.with_name("run")
    held.mkdir()
    (held / "recipe.yaml").write_text("model: another\n", "utf-8")
    refused(multiflora("train", "recipe.yaml"), "holds a run", "Choose another output folder")
    assert {path.name: path.read_text("utf-8") for path in held.iterdir()} == {"recipe.yaml": "model: another\n"}


def test_a_model_that_is_not_there(multiflora: Command, recipe: Path) -> None:
    refused(multiflora("train", "recipe.yaml", "--set", "model=nobody/nothing"), "nobody/nothing", "embedded")
    assert not recipe.with_name("run").exists()


def test_yaml_that_is_not_yaml_or_is_more_than_a_recipe(multiflora: Command, recipe: Path) -> None:
    change(recipe, "train: {", "train: ")
    refused(multiflora("train", "recipe.yaml"), "recipe.yaml, line 4", "not valid YAML", "Check the indentation")
    recipe.write_text("a: &a [x, x]\n" + "\n".join(f"k{i}: &a [*a, *a, *a, *a]" for i in range(20)), "utf-8")
    refused(multiflora("train", "recipe.yaml"), "recipe.yaml, line 2", "stands within itself; write it out")
    recipe.write_text("model: m\nmodel: n\n", "utf-8")
    refused(multiflora("train", "recipe.yaml"), "recipe.yaml, line 2", "the key 'model' is given twice")


def test_a_template_that_would_fill_the_memory(multiflora: Command, recipe: Path) -> None:
    task = 'name: roses\nsource: ./roses.jsonl\nprompt: "{{ prompt * 10**9 }}"\nchoices: choices\nanswer: answer\n'
    recipe.with_name("big.yaml").write_text(task, "utf-8")
    ended = multiflora("tasks", "show", "./big.yaml")
    refused(
        ended,
        "roses.jsonl, line 1",
        "the prompt of task roses fails on this row",
        "it takes more than 512 MiB of memory",
    )


def test_a_tampered_adapter_is_named_by_file_and_tensor(multiflora: Command, tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    folder = tmp_path / "theirs"
    folder.mkdir()
    folder.joinpath("adapter_config.json").write_text(json.dumps(config), "utf-8")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {name.format("A"): np.ones((2, 8), np.float32), name.format("B"): np.full((8, 2), np.nan, np.float32)}
    save_file(tensors, folder / "adapter_model.safetensors")
    ended = multiflora("convert", "theirs", "--output", "plain")
    refused(ended, "adapter_model.safetensors", f"tensor {name.format('B')} holds NaN or infinity")
    folder.joinpath("adapter_config.json").write_text(json.dumps(config | {"r": 10**6}), "utf-8")
    refused(multiflora("convert", "theirs", "--output", "plain"), "says r = 1,000,000, but no tensor is that large")
    assert not tmp_path.joinpath("plain").exists()


def test_a_rank_that_no_machine_can_hold(multiflora: Command, recipe: Path) -> None:
    ended = multiflora("train", "recipe.yaml", "--set", "method.r=1000000000000", "--set", "evaluate.before=false")
    refused(ended, "method.r is 1000000000000; it must be a whole number of at least 1, and at most 1,000,000")
    assert not recipe.with_name("run").exists()


def test_examples_that_are_too_long_are_left_out_and_counted(multiflora: Command, recipe: Path) -> None:
    write_task(recipe.parent, "roses", long=3)
    ended = multiflora("train", "recipe.yaml", "--dry-run")
    assert ended.code == 0, ended.err
    assert "roses: " in ended.out
    assert "examples are longer than train.max_length = 128 tokens" in " ".join(ended.out.split())


def test_no_space_left_loses_nothing_that_was_there(installed: Command, recipe: Path) -> None:
    def small_files() -> None:
        # the system's own refusal: a file may not grow beyond this, as on a disk that is nearly full
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))

    before = {path: path.read_bytes() for path in recipe.parent.iterdir() if path.is_file()}
    ended = installed("train", "recipe.yaml", preexec_fn=small_files)
    refused(ended, "No space left", "run")
    assert not recipe.with_name("run").joinpath("adapter_model.safetensors").exists()
    assert {path: path.read_bytes() for path in before} == before


def test_a_recipe_that_may_not_be_written(multiflora: Command, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("mine", "utf-8")
    refused(multiflora("init"), "recipe.yaml exists already", "--force")
    assert (tmp_path / "recipe.yaml").read_text("utf-8") == "mine"
    refused(multiflora("init", "nowhere/recipe.yaml"), "there is no folder nowhere")
    assert multiflora("init", "--force").code == 0
    assert "Multiflora recipe" in (tmp_path / "recipe.yaml").read_text("utf-8")


@pytest.mark.parametrize(
    "words", [["trian"], ["train"], ["train", "recipe.yaml", "--resum"], ["evaluate", "run", "--limit", "0"]]
)
def test_a_mistyped_command_line(multiflora: Command, words: list[str]) -> None:
    ended = multiflora(*words)
    assert ended.code == 2
    assert "Usage: multiflora" in ended.err
    assert ended.out == ""


def test_debug_shows_the_traceback_wherever_it_stands(installed: Command) -> None:
    for words in (["--debug", "train", "absent.yaml"], ["train", "absent.yaml", "--debug"]):
        ended = installed(*words)
        assert ended.code == 2
        assert "Traceback (most recent call last)" in ended.err
        assert "Error: absent.yaml does not exist" in ended.err.replace("\n", " ")


def test_an_unknown_method_and_task_to_show(multiflora: Command) -> None:
    refused(multiflora("methods", "show", "hydra"), "'hydra' is not a method", "did you mean hydralora?")
    refused(multiflora("tasks", "show", "bolq"), "'bolq' is not a shipped task", "did you mean boolq?")


def test_json_goes_to_stdout_alone(installed: Command) -> None:
    ended = installed("methods", "--json")
    assert ended.code == 0
    assert json.loads(ended.out)["rlora"]["config"] == "RLoraConfig"
    assert ended.err == ""
