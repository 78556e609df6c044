"""A language model of one million parameters on two real tasks: the loss of each falls within twenty steps."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from multiflora.base_model import load_model, load_tokenizer
from multiflora.data.prepare import encode_tasks
from multiflora.recipe import recipe_from
from multiflora.training.adapter import add_adapter
from multiflora.training.fit import fit

SHARED = Path(os.environ.get("MULTIFLORA_SHARED", Path(__file__).parents[3] / "shared"))


@pytest.mark.skipif(not (SHARED / "models/tinylm-1m").is_dir(), reason=f"needs the model and the tasks in {SHARED}")
@pytest.mark.parametrize("packing", [False, True])
def test_each_tasks_loss_falls(tmp_path: Path, packing: bool) -> None:
    recipe = recipe_from(
        {
            "model": str(SHARED / "models/tinylm-1m"),
            "method": {"name": "rlora", "r": 4},
            "tasks": [{"name": name, "source": str(SHARED / "data/tasks" / name)} for name in ("sst2", "trec")],
            "train": {"max_steps": 20, "learning_rate": 2e-3, "max_length": 96, "log_every": 5, "packing": packing},
            "output": str(tmp_path / "run"),
        }
    )
    tokenizer = load_tokenizer(recipe.model)
    model = add_adapter(load_model(recipe.model, torch.float32), recipe)
    _, log = fit(model, tokenizer, recipe, encode_tasks(recipe, tokenizer), quiet=True)
    for task in ("sst2", "trec"):
        losses = [line[f"loss/{task}"] for line in log if f"loss/{task}" in line]
        assert losses[-1] < 0.5 * losses[0]
