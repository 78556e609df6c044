"""Scores on the way through a training: at the right steps, and without a trace in what is trained."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

import multiflora
from tests.cli.parts import save_model, write_task


def test_scores_on_the_way_change_nothing_and_the_checkpoints_keep_them(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    for name in ("roses", "tulips"):
        write_task(tmp_path, name)
    recipe = {
        "model": str(tmp_path / "model"),
        # dropout draws at random in every step: a scoring that drew too would show
        "method": {"name": "lora", "r": 2, "lora_dropout": 0.3},
        "tasks": [str(tmp_path / "roses.jsonl"), str(tmp_path / "tulips.jsonl")],
        "train": {"max_steps": 6, "batch_size": 4, "max_length": 64, "learning_rate": 1e-2, "save_every": 5},
        "evaluate": {"limit": 2, "before": False},
        "output": str(tmp_path / "plain"),
    }
    multiflora.train(recipe, quiet=True)
    scored = recipe | {
        "evaluate": {"limit": 2, "before": False, "during": [0.3, 0.5]},
        "output": str(tmp_path / "scored"),
    }
    multiflora.train(scored, quiet=True)
    plain, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "scored"))
    assert all((plain[name] == other[name]).all() for name in plain)

    course = json.loads((tmp_path / "scored" / "results.json").read_text())["training"]["course"]
    assert [(point["step"], point["share"]) for point in course] == [(2, 0.3), (3, 0.5)]
    assert set(course[0]["scores"]["tasks"]) == {"roses", "tulips"}
    state = json.loads((tmp_path / "scored" / "checkpoints" / "checkpoint-5" / "trainer_state.json").read_text())
    assert [line["step"] for line in state["log_history"] if "scores" in line] == [2, 3]
    assert "course" not in json.loads((tmp_path / "plain" / "results.json").read_text())["training"]
    seconds = json.loads((tmp_path / "scored" / "run.json").read_text())["seconds"]
    assert seconds["evaluate_during"] > 0
