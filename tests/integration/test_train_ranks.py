"""Two processes on the CPU, with DDP, FSDP2 or DeepSpeed: they train, save, resume and score what one process does."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from multiflora.data.prepare import encode_tasks
from multiflora.recipe import load_recipe
from multiflora.training.checkpoint import last_checkpoint
from tests.integration.ranks import FSDP2, ZERO2, ZERO3, deepspeed_file, run_ranks, said
from tests.integration.toys import make_recipe, make_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")]

ENGINES = {
    "ddp": {},
    "fsdp2": FSDP2,
    "zero2": ZERO2,
    "zero3": ZERO3,
    "zero3 of all": deepspeed_file(stage=3, stage3_param_persistence_threshold=0),
}

engines = pytest.mark.parametrize(
    "engine",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                "zero" in name and importlib.util.find_spec("deepspeed") is None,
                reason="DeepSpeed is not installed: pip install deepspeed",
            ),
        )
        for name in ENGINES
    ],
)


@pytest.fixture
def model(tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> str:
    tokenizer = make_tokenizer()
    place = tmp_path / "model"
    tiny_llama(vocab_size=len(tokenizer), initializer_range=0.2, eos_token_id=1).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


def write_recipe(folder: Path, model: str, method: Any, **train: Any) -> Path:
    # plain gradient descent: Adam's first steps would blow up the last bit of a gradient near 0
    plain = {"max_steps": 4, "batch_size": 4, "log_every": 1, "bf16": False, "optimizer": "sgd", "learning_rate": 0.3}
    settings = plain | train
    recipe = make_recipe(folder, method, model=model, **settings)
    path = folder / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    return path


def train(processes: int, recipe: Path, *words: str, engine: str = "ddp") -> None:
    place = recipe.parent / "said"
    codes = run_ranks(processes, ["train", str(recipe), *words], place, ENGINES[engine] if processes > 1 else {})
    assert codes == [0] * processes, "".join(said(place, rank)[-3000:] for rank in range(processes))


def outcome(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "results.json").read_text())


@engines
def test_two_processes_are_one_with_twice_the_batch(model: str, tmp_path: Path, engine: str) -> None:
    # 96 examples in steps of 20: the last one has 16, and the processes must take equally many batches of it
    settings = {"max_steps": None, "epochs": 1.0}
    one = write_recipe(tmp_path / "one", model, {"name": "rlora", "head_dropout": 0.0}, batch_size=20, **settings)
    two = write_recipe(tmp_path / "two", model, {"name": "rlora", "head_dropout": 0.0}, batch_size=10, **settings)
    train(1, one)
    train(2, two, engine=engine)
    adapter, results = outcome(tmp_path / "one" / "run")
    other, others = outcome(tmp_path / "two" / "run")
    assert other.keys() == adapter.keys()
    for name, tensor in adapter.items():
        assert_close(other[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
    log = results["training"]["log"]
    assert len(log) == 5
    assert log[-1]["loss"] < log[0]["loss"]
    for line, same in zip(log, others["training"]["log"], strict=True):
        assert {key: pytest.approx(value, rel=1e-4) for key, value in line.items()} == same
    for stage in ("base", "adapted"):
        for task, score in results[stage]["tasks"].items():
            assert others[stage]["tasks"][task]["score"] == pytest.approx(score["score"], abs=1e-3)


@engines
def test_a_resumed_run_of_two_equals_one_that_never_stopped(model: str, tmp_path: Path, engine: str) -> None:
    method = {"name": "rlora", "lora_dropout": 0.1, "head_dropout": 0.2}
    settings = {"optimizer": "adamw_torch", "learning_rate": 1e-2, "save_every": 3, "max_steps": 5, "log_every": 2}
    recipe = write_recipe(tmp_path, model, method, **settings)
    train(2, recipe, engine=engine)
    adapter, results = outcome(tmp_path / "run")
    # as it is after a crash in the fifth step
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-5"]
    shutil.rmtree(checkpoints / "checkpoint-5")
    for path in (tmp_path / "run").iterdir():
        if path != checkpoints:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(2, recipe, "--resume", engine=engine)
    again, same = outcome(tmp_path / "run")
    assert all(tensor.equal(again[name]) for name, tensor in adapter.items())
    assert same["training"]["log"] == results["training"]["log"]
    assert same["adapted"] == results["adapted"]


def test_two_processes_keep_the_same_best_adapter_and_end_at_the_same_step(model: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model, "rlora", max_steps=20, save_every=2, learning_rate=1e-6)
    asked = ("every=2", "keep_best=worst", "early_stopping_patience=1", "before=false")
    words = [word for key in asked for word in ("--set", f"evaluate.{key}")]
    train(2, recipe, *words)
    assert said(recipe.parent / "said").count("  validation scores ") == 2
    assert "  validation scores " not in said(recipe.parent / "said", 1)
    adapter, results = outcome(tmp_path / "run")
    training = results["training"]
    assert (training["best"]["step"], training["steps"]) == (2, 4)  # so low a rate changes nothing
    for path in (tmp_path / "run").iterdir():
        if path.is_file():
            path.unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-4")
    train(2, recipe, "--resume", *words)
    again, same = outcome(tmp_path / "run")
    assert all(tensor.equal(again[name]) for name, tensor in adapter.items())
    assert same == results


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_deepspeed_that_is_not_installed_is_asked_for(model: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model, "rlora")
    assert run_ranks(2, ["train", str(recipe)], tmp_path, ZERO2) == [2, 2]
    assert "DeepSpeed, which is not installed: pip install 'multiflora[deepspeed]'" in said(tmp_path)
    assert not (tmp_path / "run").exists()


def test_processes_drop_different_units(model: str, tmp_path: Path) -> None:
    # with the same examples in both, equal masks would make the step that one process makes
    recipe = write_recipe(tmp_path, model, {"name": "rlora", "head_dropout": 0.5}, max_steps=1, save_every=1)
    train(2, recipe)
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    first, second = (torch.load(checkpoint / f"rng_state_{rank}.pth", weights_only=False) for rank in (0, 1))
    assert not first["cpu"].equal(second["cpu"])


def test_a_signal_to_one_process_stops_all_at_the_same_step(model: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model, "rlora", max_steps=500)

    def strike(line: str, ranks: list[BaseProcess]) -> None:
        if line.startswith("step 2 "):
            assert ranks[1].pid is not None
            os.kill(ranks[1].pid, signal.SIGTERM)

    codes = run_ranks(2, ["train", str(recipe), "--set", "evaluate.before=false"], tmp_path, on_line=strike)
    assert codes == [143, 143], said(tmp_path)[-3000:] + said(tmp_path, 1)[-3000:]
    kept = last_checkpoint(tmp_path / "run")
    assert kept is not None
    assert f"{kept}; go on with --resume" in said(tmp_path)
    assert 2 <= int(kept.name.rpartition("-")[2]) < 500


def test_numbers_that_go_bad_in_one_process_stop_all_and_name_its_examples(model: str, tmp_path: Path) -> None:
    weights = load_file(Path(model) / "model.safetensors")
    weights["model.embed_tokens.weight"][make_tokenizer().convert_tokens_to_ids("3")] = float("inf")
    save_file(weights, Path(model) / "model.safetensors", metadata={"format": "pt"})
    recipe = write_recipe(tmp_path, model, "rlora", max_steps=20, batch_size=1)
    codes = run_ranks(2, ["train", str(recipe), "--set", "evaluate.before=false"], tmp_path)
    assert codes == [2, 2], said(tmp_path)[-3000:] + said(tmp_path, 1)[-3000:]
    [message] = [line for line in said(tmp_path).splitlines() if "no longer finite" in line]
    found = re.search(
        r"at step (\d+) \(tasks: .*The examples with a bad loss: (.*)\. The run stopped; there is no", message
    )
    assert found is not None
    examples = encode_tasks(load_recipe(recipe), make_tokenizer()).take(40, batch_size=2).dataset
    three = make_tokenizer().convert_tokens_to_ids("3")
    bad = [three in ids for ids in examples["input_ids"][:]]
    first = bad.index(True) // 2  # the step, of two examples
    assert int(found[1]) == first + 1
    assert found[2].split(", ") == [examples[i]["id"] for i in (2 * first, 2 * first + 1) if bad[i]]
