"""A compression on a tiny real model: it learns, it is smaller, and it is read back from disk as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import multiflora
from multiflora import ConfigError, ExportError
from multiflora.cli import app
from multiflora.evaluation.load import load_target
from multiflora.jobs.compress import compress
from tests.integration.toys import make_tokenizer, write_tasks

TinyLlama = Callable[..., LlamaForCausalLM]


def plan(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(folder / "model"),
        "tasks": write_tasks(folder / "tasks"),
        "train": {"max_steps": 20, "max_length": 40, "learning_rate": 5e-3, "log_every": 5},
        "evaluate": {"limit": 4, "batch_size": 4},
        "method": {"name": "losparse", "low_rank": 0.2, "keep": 0.2, "every": 2},
        "output": str(folder / "small"),
        **more,
    }


@pytest.fixture
def folder(tiny_llama: TinyLlama, tmp_path: Path) -> Path:
    tokenizer = make_tokenizer()
    tiny_llama(vocab_size=len(tokenizer), initializer_range=0.2).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path


def test_a_model_is_made_smaller_and_comes_back(folder: Path) -> None:
    made = compress(plan(folder), quiet=True)
    size = made.parameters
    assert size["after"] < size["before"]
    assert size["layers_after"] < 0.6 * size["layers_before"]
    assert 0 < made.rows_left < 0.5
    assert made.seconds["before"] > 0
    assert set(made.base["tasks"]) == set(made.compressed["tasks"]) == {"echo", "next"}
    told = json.loads((folder / "small/compression.json").read_text())
    assert told["parameters"] == dict(size)
    model = multiflora.load_compressed(folder / "small")
    assert sum(p.numel() for p in model.parameters()) == size["after"]
    ids = torch.arange(6).view(1, 6)
    loaded = load_target(folder / "small").model
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 9)
    with pytest.raises(ConfigError, match="holds a run already; nothing was changed there"):
        compress(plan(folder), quiet=True)
    form = json.loads((folder / "small/losparse.json").read_text())
    form["layers"].popitem()
    (folder / "small/losparse.json").write_text(json.dumps(form))
    with pytest.raises(ExportError, match="do not belong together"):
        multiflora.load_compressed(folder / "small")


def test_what_cannot_be_compressed_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"method: low_rank is 0.6 and keep is 0.5; together they must be below 1"):
        compress(plan(folder, method={"name": "losparse", "low_rank": 0.6, "keep": 0.5}))
    with pytest.raises(ConfigError, match=r"method is lora, which makes no model smaller"):
        compress(plan(folder, method="lora"))
    with pytest.raises(ExportError, match="holds no compressed model"):
        multiflora.load_compressed(folder / "model")
    (folder / "recipe.yaml").write_text(json.dumps(plan(folder)))
    words = ["compress", str(folder / "recipe.yaml"), "--set", "method.every=0"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert not (folder / "small").exists()
