"""The whole of ``multiflora.train`` on a tiny model: every step real, every file looked at."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

import multiflora
from multiflora.errors import ConfigError, DataError, EnvironmentProblem
from multiflora.recipe import Recipe, load_recipe
from multiflora.training.checkpoint import CHECKPOINTS
from tests.integration.toys import make_recipe, make_tokenizer

TinyLlama = Callable[..., LlamaForCausalLM]


@pytest.fixture
def model_folder(tiny_llama: TinyLlama, tmp_path: Path) -> str:
    folder = tmp_path / "model"
    tokenizer = make_tokenizer()
    tiny_llama(vocab_size=len(tokenizer), initializer_range=0.2, eos_token_id=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def recipe_in(folder: Path, model: str, method: Any = "rlora", **train: Any) -> Recipe:
    return make_recipe(folder, method, model=model, **train)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The nearest thing to a full disk that needs no rights: the system refuses to let a file grow further."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_run_ends_in_an_adapter_a_table_and_its_own_explanation(model_folder: str, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, model_folder, max_steps=30)
    result = multiflora.train(recipe, quiet=True)
    there = {path.name for path in result.output.iterdir()}
    assert there >= {"adapter_model.safetensors", "adapter_config.json", "recipe.yaml", "results.json", "README.md"}
    results = json.loads((result.output / "results.json").read_text())
    assert results["base"]["tasks"].keys() == results["adapted"]["tasks"].keys() == {"echo", "next"}
    assert results["adapted"]["tasks"]["next"]["score"] < results["base"]["tasks"]["next"]["score"]  # nats per token
    assert results["mixture"]["echo"]["examples"] + results["mixture"]["next"]["examples"] == 240
    assert results["training"]["log"][-1]["loss/echo"] < results["training"]["log"][0]["loss/echo"]
    assert 0 < results["parameters"]["trainable"] < results["parameters"]["total"]
    assert load_recipe(result.output / "recipe.yaml") == recipe
    assert result.table().row_count >= 2
    assert len(result.log) == 4  # three log lines and the summary


def test_the_same_recipe_gives_the_same_results_file_twice(model_folder: str, tmp_path: Path) -> None:
    files = []
    for place in ("first", "second"):
        (tmp_path / place).mkdir()
        recipe = recipe_in(tmp_path / place, model_folder, {"name": "rlora", "lora_dropout": 0.1}, max_steps=4)
        files.append((multiflora.train(recipe, quiet=True).output / "results.json").read_bytes())
    assert files[0] == files[1]


def test_an_output_folder_that_holds_a_run_is_refused_at_once(model_folder: str, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, "no/such-model-is-ever-looked-for")
    recipe.output.mkdir()
    (recipe.output / "recipe.yaml").write_text("the earlier run")
    with pytest.raises(ConfigError, match=r"holds a run already; nothing was changed there"):
        multiflora.train(recipe, quiet=True)
    assert [path.name for path in recipe.output.iterdir()] == ["recipe.yaml"]
    assert (recipe.output / "recipe.yaml").read_text() == "the earlier run"


def test_a_full_disk_loses_nothing_and_the_run_can_be_started_again(model_folder: str, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, model_folder, max_steps=2)
    full = pytest.raises(EnvironmentProblem, match=r"No space left to write the run to .*run.*Free some space")
    with full, files_of_at_most(4096):
        multiflora.train(recipe, quiet=True)
    assert not recipe.output.exists()
    assert (multiflora.train(recipe, quiet=True).output / "adapter_model.safetensors").exists()


def test_an_interrupted_run_resumes_to_the_same_results(model_folder: str, tmp_path: Path) -> None:
    results = []
    for place in ("whole", "stopped"):
        (tmp_path / place).mkdir()
        recipe = recipe_in(tmp_path / place, model_folder, max_steps=6, save_every=4, log_every=1)
        finished = multiflora.train(recipe, quiet=True)
        if place == "stopped":  # back to what a run killed after its checkpoint leaves behind
            for path in recipe.output.iterdir():
                if path.name != CHECKPOINTS and path.is_file():
                    path.unlink()
            with pytest.raises(ConfigError, match=r"go on from its checkpoints with --resume"):
                multiflora.train(recipe, quiet=True)
            for path in (recipe.output / CHECKPOINTS / "checkpoint-6").iterdir():
                path.unlink()
            rows = tmp_path / place / "tasks/echo/train.jsonl"
            before = rows.read_text("utf-8")
            rows.write_text(before + before.splitlines()[0] + "\n", "utf-8")
            with pytest.raises(ConfigError, match=r"trained on other data: echo \(48 training rows then, 49 now\)"):
                multiflora.train(recipe, resume=True, quiet=True)
            rows.write_text(before, "utf-8")
            finished = multiflora.train(recipe, resume=True, quiet=True)
        results.append((finished.output / "results.json").read_bytes())
    assert results[0] == results[1]


STOPS = """
import sys, multiflora
from multiflora.training import fit
from transformers import TrainerCallback

class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 2:
            print("here", flush=True)
            sys.stdin.read()

trainer = fit.MultitaskTrainer
fit.MultitaskTrainer = lambda **words: trainer(**words | {"callbacks": [Stop(), *words["callbacks"]]})
multiflora.train(sys.argv[1], quiet=True)
"""


def test_a_folder_belongs_to_one_run_and_is_free_when_that_was_killed_with_nothing_saved(
    model_folder: str, tmp_path: Path
) -> None:
    recipe = recipe_in(tmp_path, model_folder, max_steps=3, save_every=3)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), "utf-8")
    first = subprocess.Popen(
        [sys.executable, "-c", STOPS, str(tmp_path / "recipe.yaml")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert first.stdout is not None
    try:
        assert first.stdout.readline() == b"here\n"
        for resume in (False, True):
            with pytest.raises(ConfigError, match=r"which another run is writing to at this moment"):
                multiflora.train(recipe, resume=resume, quiet=True)
    finally:
        first.kill()
        first.communicate()
    assert (multiflora.train(recipe, quiet=True).output / "adapter_model.safetensors").exists()


def test_an_empty_task_is_refused_before_the_model_is_loaded(model_folder: str, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, model_folder)
    (tmp_path / "tasks" / "echo" / "train.jsonl").write_text("")
    with pytest.raises(DataError, match=r"echo"):
        multiflora.train(recipe, quiet=True)
    assert not recipe.output.exists()
