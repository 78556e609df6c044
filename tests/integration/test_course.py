"""Scores on the way through a training: at the right steps, without a trace in what is trained; the best of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import multiflora
from multiflora.errors import DataError
from tests.cli.parts import save_model, write_task


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    save_model(tmp_path / "model")
    for name in ("roses", "tulips"):
        write_task(tmp_path, name)
    return {
        "model": str(tmp_path / "model"),
        # dropout draws at random in every step: a scoring that drew too would show
        "method": {"name": "lora", "r": 2, "lora_dropout": 0.3},
        "tasks": [str(tmp_path / "roses.jsonl"), str(tmp_path / "tulips.jsonl")],
        "train": {"max_steps": 6, "batch_size": 4, "max_length": 64, "learning_rate": 1e-2, "save_every": 5},
        "evaluate": {"limit": 2, "before": False},
        "output": str(tmp_path / "plain"),
    }


def in_nats(folder: Path, name: str) -> dict[str, Any]:
    """A task of which more is learned with every step, and forgotten again at too high a rate; 3 validation rows."""
    source = {}
    for split, rows in (("train", 24), ("validation", 3), ("test", 2)):
        lines = [{"prompt": f"{split} {name} {i} is", "completion": [" red", " blue"][i % 2]} for i in range(rows)]
        path = folder / f"{name}-{split}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        source[split] = str(path)
    return {"name": name, "source": source, "score": "nll"}


def results_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def test_scores_on_the_way_change_nothing_and_the_checkpoints_keep_them(tmp_path: Path, recipe: Any) -> None:
    multiflora.train(recipe, quiet=True)
    scored = recipe | {
        "evaluate": {"limit": 2, "before": False, "during": [0.3, 0.5], "every": 4},
        "output": str(tmp_path / "scored"),
    }
    multiflora.train(scored, quiet=True)
    plain, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "scored"))
    assert all((plain[name] == other[name]).all() for name in plain)

    training = results_of(tmp_path / "scored")["training"]
    course = training["course"]
    assert [(point["step"], point["share"]) for point in course] == [(2, 0.3), (3, 0.5)]
    assert set(course[0]["scores"]["tasks"]) == {"roses", "tulips"}
    assert [point["step"] for point in training["validation"]] == [4, 6]
    state = json.loads((tmp_path / "scored" / "checkpoints" / "checkpoint-5" / "trainer_state.json").read_text())
    assert [line["step"] for line in state["log_history"] if "scores" in line] == [2, 3, 4]
    assert {"course", "validation", "best", "steps"}.isdisjoint(results_of(tmp_path / "plain")["training"])
    seconds = json.loads((tmp_path / "scored" / "run.json").read_text())["seconds"]
    assert seconds["evaluate_during"] > 0


def test_the_best_adapter_is_saved_the_training_ends_early_and_a_resumed_run_knows_both(
    tmp_path: Path, recipe: Any
) -> None:
    train = {"max_steps": 40, "batch_size": 4, "max_length": 64, "learning_rate": 0.1, "save_every": 2, "log_every": 3}
    train |= {"lr_scheduler": "constant", "warmup_ratio": 0.0, "group_by_length": False}
    patient = {"before": False, "every": 2, "keep_best": "worst", "early_stopping_patience": 2}
    tasks = [in_nats(tmp_path, name) for name in ("roses", "tulips")]
    asked = recipe | {"tasks": tasks, "train": train, "evaluate": patient, "output": str(tmp_path / "run")}
    output = multiflora.train(asked, quiet=True).output
    adapter, results = load_file(output / "adapter_model.safetensors"), (output / "results.json").read_bytes()
    training = results_of(output)["training"]
    worst = {
        point["step"]: max(score["score"] for score in point["scores"]["tasks"].values())
        for point in training["validation"]
    }
    best = min(worst, key=lambda step: worst[step])
    assert list(worst) == list(range(2, best + 5, 2))  # two more without a better one
    assert 2 < best < 36
    assert training["best"] == {"step": best, "by": "worst", "score": worst[best]}
    assert (training["steps"], training["planned_steps"]) == (best + 4, 40)
    assert [line["step"] for line in training["log"]] == list(range(3, best + 5, 3))
    assert {score["n"] for score in training["validation"][0]["scores"]["tasks"].values()} == {3}  # no test rows
    assert sum(row["examples"] for row in results_of(output)["mixture"].values()) == 4 * (best + 4)
    card = (output / "README.md").read_text()
    assert f"The adapter is that of step {best}, whose worst task's score on validation rows was the best" in card
    assert f"ended early, after {best + 4} of 40 steps" in card

    # what a training of so many steps, without any scores, ends in
    short = {"train": train | {"max_steps": best}, "evaluate": {"before": False}, "output": str(tmp_path / "short")}
    alone = load_file(multiflora.train(asked | short, quiet=True).output / "adapter_model.safetensors")
    assert all((adapter[name] == alone[name]).all() for name in alone)

    # killed when it was done, and killed before
    for last in (best + 4, best + 2):
        for path in output.iterdir():
            if path.is_file():
                path.unlink()
        for checkpoint in (output / "checkpoints").glob("checkpoint-*"):
            if int(checkpoint.name.partition("-")[2]) > last:
                shutil.rmtree(checkpoint)
        multiflora.train(asked, resume=True, quiet=True)
        again = load_file(output / "adapter_model.safetensors")
        assert all((adapter[name] == again[name]).all() for name in adapter)
        assert (output / "results.json").read_bytes() == results


def test_a_task_without_validation_rows_is_told_before_the_model_is_loaded(tmp_path: Path, recipe: Any) -> None:
    source = {"train": recipe["tasks"][0], "test": recipe["tasks"][1]}
    tasks = [{"name": "roses", "source": source, "split_sizes": {}}]
    asked = recipe | {"model": "no/such-model-is-ever-looked-for", "tasks": tasks, "evaluate": {"every": 2}}
    with pytest.raises(
        DataError, match=r"evaluate.every is 2, which scores validation rows: task roses has no validation split"
    ):
        multiflora.train(asked, quiet=True)
