"""An adapter of one of two tied weights through every command: the same refusal, or what the adapter computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from made_adapters import adapted, save
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from multiflora.cli import app
from multiflora.export.same import logits_of

from .parts import save_model, write_task

SETTINGS: list[dict[str, Any]] = [
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj", "lm_head"]},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("tied") / "base")
    config = json.loads((folder / "config.json").read_text("utf-8")) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("method", ["lora", "multilora"])
def test_every_command_says_the_same(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, settings: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = adapted(method, AutoModelForCausalLM.from_pretrained(base), **{"target_modules": ["q_proj"]} | settings)
    save(model, tmp_path / "run")
    write_task(tmp_path, "roses")
    recipe = {
        "model": str(base),
        "method": {"name": method, "target_modules": ["q_proj"], **settings},
        "tasks": ["./roses.jsonl", {"name": "again", "source": "./roses.jsonl"}],
        "train": {"max_steps": 1},
        "output": "again",
    }
    Path("recipe.yaml").write_text(json.dumps(recipe), "utf-8")
    (tmp_path / "run/recipe.yaml").write_text(json.dumps(recipe | {"tasks": [str(tmp_path / "roses.jsonl")] * 1}))

    def ran(*words: str) -> Any:
        ended = CliRunner().invoke(app, list(words))
        assert ended.exit_code in (0, 2), (words, ended.exception, ended.output)
        return ended

    for words in (["train", "recipe.yaml", "--dry-run"], ["train", "recipe.yaml"], ["evaluate", "run", "--limit", "1"],
                  ["analyze", "run"], ["serve", str(base), "run", "--port", "0"]):  # fmt: skip
        ended = ran(*words)
        assert ended.exit_code == 2, (words, ended.output)
        assert "share one weight in this model" in ended.output, (words, ended.output)
        assert "scored in" not in ended.output, (words, ended.output)  # no work was done for nothing
    assert ran("convert", "run", "--to", "gguf-lora").exit_code == 2
    expected = logits_of(model)
    for words, made in ((["merge", "run"], "run-dense"), (["convert", "run"], "run-lora")):
        ended = ran(*words)
        assert ended.exit_code == 0, (words, ended.output)
        assert Path(made).is_dir()
    found = logits_of(AutoModelForCausalLM.from_pretrained("run-dense").eval())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
