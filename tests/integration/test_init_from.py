"""A run that goes on from an earlier one: with what that had learned, on other tasks, and both say so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

import multiflora
from multiflora.errors import ConfigError
from multiflora.estimate import estimate
from multiflora.recipe import load_recipe, recipe_from
from tests.integration.toys import make_recipe, make_tokenizer


def test_a_run_goes_on_from_what_an_earlier_one_has_learned(
    tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_llama(vocab_size=len(tokenizer), initializer_range=0.2, eos_token_id=1).save_pretrained(tmp_path / "model")
    # LoRA-GA would take a start from the gradient in the place of what was learned
    first = make_recipe(tmp_path, "loraga", model=str(tmp_path / "model"), max_steps=3)
    first = first.model_copy(update={"evaluate": first.evaluate.model_copy(update={"before": False})})
    learned = multiflora.train(first, quiet=True).results["adapted"]["tasks"]["next"]

    more: dict[str, Any] = first.model_dump(mode="json", exclude_none=True)
    more |= {"init_from": str(first.output), "output": str(tmp_path / "more"), "tasks": [more["tasks"][1]]}
    more["train"] |= {"learning_rate": 1e-12, "max_steps": 1}  # so low that nothing is added
    asked = recipe_from(more)
    assert estimate(asked).steps == 1
    run = multiflora.train(asked, quiet=True)
    assert run.results["adapted"]["tasks"]["next"]["score"] == pytest.approx(learned["score"], rel=1e-5)
    start = json.loads((run.output / "results.json").read_text())["training"]["init_from"]
    assert (start["folder"], start["tasks"], start["fresh_tasks"]) == ("run", ["echo", "next"], [])
    assert (
        "It started from the adapter in run of the tasks echo, next (SHA-256 " in (run.output / "README.md").read_text()
    )
    assert "init_from: ../run" in (run.output / "recipe.yaml").read_text()
    assert load_recipe(run.output / "recipe.yaml") == asked

    more |= {"method": {"name": "loraga", "r": 4}, "output": str(tmp_path / "refused")}
    for refuses in (estimate, multiflora.train):
        with pytest.raises(ConfigError, match=r"init_from is .*run, whose adapter has r = 8 \(here 4\)"):
            refuses(recipe_from(more))
    assert not (tmp_path / "refused").exists()
