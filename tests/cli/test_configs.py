"""Every shipped recipe is read, resolved and read back; none is skipped."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest

from multiflora.compare.spec import load_comparison
from multiflora.methods import METHODS, build_config
from multiflora.recipe import load_recipe, recipe_from
from multiflora.yaml_file import parse_yaml

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(path.name for path in CONFIGS.rglob("*") if path.is_file())
COMPARISONS = ["relatives.yaml"]


def test_all_shipped_recipes_are_tested() -> None:
    assert SHIPPED == [
        "demo.yaml",
        "hydralora_single_domain.yaml",
        "multilora_mixture.yaml",
        "relatives.yaml",
        "rlora_understanding.yaml",
    ]


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_shipped_comparison_resolves(name: str) -> None:
    comparison = load_comparison(CONFIGS / name)
    for entry in comparison.compare.methods:
        build_config(entry.name, entry.settings)
    assert {"lora", "alignlora", "loraga", "deltalora", "mixlora", "parts"} <= {
        entry.name for entry in comparison.compare.methods
    }
    assert comparison.recipe.output == CONFIGS.parent / "runs" / name.removesuffix(".yaml")


@pytest.mark.parametrize("name", [name for name in SHIPPED if name not in COMPARISONS])
def test_a_shipped_recipe_resolves(name: str) -> None:
    recipe = load_recipe(CONFIGS / name)
    card = METHODS[recipe.method.name]
    tasks = {"num_tasks": len(recipe.tasks), "task_names": [t.name for t in recipe.tasks]} if card.module else {}
    config = build_config(card.name, {**tasks, **recipe.method.settings})
    assert config.r == recipe.method.settings["r"]
    assert recipe.output == CONFIGS.parent / "runs" / name.removesuffix(".yaml")
    assert recipe_from(parse_yaml(recipe.to_yaml(), name)) == recipe


def test_the_demo_is_the_main_job_on_embedded_parts() -> None:
    recipe = load_recipe(CONFIGS / "demo.yaml")
    assert (recipe.model.name, recipe.method.name, len(recipe.tasks)) == ("embedded", "rlora", 6)
    assert {task.source.kind for task in recipe.tasks} == {"generator"}
    assert recipe.evaluate.before


def test_the_starter_recipe_resolves_as_it_is(tmp_path: Path) -> None:
    text = files("multiflora.cli").joinpath("starter.yaml").read_text("utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(text, "utf-8")
    assert load_recipe(path).output == tmp_path / "runs" / "first"


def test_the_tasks_that_the_starter_shows_in_comments_resolve_too(tmp_path: Path) -> None:
    (tmp_path / "tickets.jsonl").write_text('{"text": "no light", "label": 1}\n' * 20, "utf-8")
    lines = files("multiflora.cli").joinpath("starter.yaml").read_text("utf-8").splitlines()
    shown = [
        line.replace("  # ", "  ", 1) if line.startswith("  # ") and "#   " not in line[:4] else line for line in lines
    ]
    text = "\n".join(line for line in shown if not line.startswith(("  Your own", "  A data set")))
    (tmp_path / "recipe.yaml").write_text(text, "utf-8")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert [task.name for task in recipe.tasks] == ["rg_chain_sum", "rg_number_filtering", "tickets", "emotion"]
    assert recipe.task("tickets").choices == (" billing", " technical", " sales")
