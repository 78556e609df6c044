"""A recipe for a mixture of experts: what is said of its experts before and after."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from mixtures import MIXTURES, mixture

import multiflora
from multiflora.estimate import estimate
from multiflora.methods.fused import LEFT_OUT
from multiflora.recipe import Recipe
from tests.integration.toys import make_recipe, make_tokenizer


@pytest.fixture
def folder_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Saves a tiny mixture with the toy tasks' tokenizer."""

    def save(kind: str) -> str:
        tokenizer = make_tokenizer()
        monkeypatch.setattr(MIXTURES[kind], "vocab_size", len(tokenizer))
        folder = tmp_path / "model"
        mixture(kind).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


def left_out_of(recipe: Recipe) -> list[str]:
    return [note for note in estimate(recipe).notes if note.startswith(LEFT_OUT)]


@pytest.mark.parametrize(("method", "kind"), [("rlora", "mixtral"), ("lora", "gpt-oss")])
def test_a_run_says_that_experts_are_left_out(
    method: str, kind: str, folder_of: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make_recipe(tmp_path, {"name": method, "r": 2}, model=folder_of(kind), max_steps=1)
    (told,) = left_out_of(recipe)
    with caplog.at_level(logging.WARNING):
        made = multiflora.train(recipe, quiet=True)
    assert told in caplog.messages
    assert f"- {told}" in (made.output / "README.md").read_text("utf-8")


def test_nothing_is_said_where_modules_were_named_or_experts_are_adapted(
    folder_of: Callable[[str], str], tmp_path: Path
) -> None:
    model = folder_of("mixtral")
    assert not left_out_of(make_recipe(tmp_path, {"name": "rlora", "target_modules": ["q_proj"]}, model=model))
    # peft's LoRA takes all-linear on this model as it was when its experts were linear layers
    assert not left_out_of(make_recipe(tmp_path, {"name": "lora", "r": 2}, model=model))
