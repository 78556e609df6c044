"""Every shipped recipe is read, resolved and read back; none is skipped."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest

from multiflora.comparison.spec import load_comparison
from multiflora.methods import METHODS, build_config
from multiflora.recipe import load_recipe, recipe_from
from multiflora.yaml_file import parse_yaml

CONFIGS = Path(__file__).parents[2] / "configs"
# those in accelerate are no recipes: tests/unit/test_accelerate_configs.py reads them
SHIPPED = sorted(
    str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*") if path.is_file() and path.parent.name != "accelerate"
)
PAPERS = [name for name in SHIPPED if name.startswith("papers/")]
COMPARISONS = ["relatives.yaml"]
# those are for `accelerate launch`; tests/unit/test_accelerate_configs.py reads them
ENGINES = [name for name in SHIPPED if name.startswith("accelerate/")]
RECIPES = [name for name in SHIPPED if name not in (*PAPERS, *COMPARISONS, *ENGINES)]


def test_all_shipped_recipes_are_tested() -> None:
    assert RECIPES == [
        "demo.yaml",
        "grpo.yaml",
        "hydralora_single_domain.yaml",
        "multilora_mixture.yaml",
        "rlora_understanding.yaml",
    ]
    assert set(COMPARISONS) <= set(SHIPPED)
    assert PAPERS == [
        "papers/multilora_llama.yaml",
        "papers/rlora_eight_tasks.yaml",
        "papers/rlora_five_tasks.yaml",
        "papers/rlora_flan_to_bbh.yaml",
        "papers/small_flan_to_bbh.yaml",
        "papers/small_multilora.yaml",
        "papers/small_rlora_eight_tasks.yaml",
        "papers/small_rlora_five_tasks.yaml",
    ]


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_shipped_comparison_resolves(name: str) -> None:
    comparison = load_comparison(CONFIGS / name)
    for entry in comparison.compare.methods:
        build_config(entry.name, entry.settings)
    assert {"lora", "alignlora", "loraga", "deltalora", "lorahub", "mixlora", "parts"} <= {
        entry.name for entry in comparison.compare.methods
    }
    assert comparison.recipe.output == CONFIGS.parent / "runs" / name.removesuffix(".yaml")


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_resolves(name: str) -> None:
    recipe = load_recipe(CONFIGS / name)
    card = METHODS[recipe.method.name]
    tasks = {"num_tasks": len(recipe.tasks), "task_names": [t.name for t in recipe.tasks]} if card.module else {}
    config = build_config(card.name, {**tasks, **recipe.method.settings})
    assert config.r == recipe.method.settings["r"]
    assert recipe.output == CONFIGS.parent / "runs" / name.removesuffix(".yaml")
    assert recipe_from(parse_yaml(recipe.to_yaml(), name)) == recipe


# shapes alone decide a rank: those of the models that the files name, which are not here
SHAPES = {
    "huggyllama/llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    "meta-llama/Llama-2-7b-hf": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    "Qwen/Qwen2.5-0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24},
    "embedded": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
}


@pytest.mark.parametrize("name", PAPERS)
def test_a_paper_s_set_up_resolves_and_its_ranks_can_be_solved(name: str) -> None:
    from transformers import LlamaConfig

    from multiflora.comparison.plan import competitors

    comparison = load_comparison(CONFIGS / name)
    assert comparison.recipe.output == CONFIGS.parent / "runs" / name.removesuffix(".yaml")
    assert load_comparison(parse_yaml(comparison.to_yaml(), name)) == comparison
    spec = comparison.compare
    assert spec.about
    assert spec.stated
    assert spec.chosen
    heads = 8 if comparison.recipe.model.name != "Qwen/Qwen2.5-0.5B" else 14
    shape = SHAPES[comparison.recipe.model.name]
    found = {c.label: c for c in competitors(comparison, LlamaConfig(**shape, num_attention_heads=heads))}
    assert set(found) == {entry.label for entry in spec.methods}
    if spec.budget.equal == "parameters":
        target = found[spec.budget.of or spec.reference()].parameters
        solved = [c for c in found.values() if c.solved]
        assert solved
        assert all(abs(c.parameters / target - 1) < 0.1 for c in solved)


def test_a_paper_s_set_up_has_a_small_twin_of_its_competitors() -> None:
    twins = {name for name in PAPERS if "/small_" in name}
    large = sorted(set(PAPERS) - twins)
    assert len(large) == len(twins) == 4
    for name in twins:
        comparison = load_comparison(CONFIGS / name)
        assert comparison.recipe.model.name == "embedded"
        assert {task.source.kind for task in comparison.recipe.tasks} == {"generator"}
    for name in large:
        text = (CONFIGS / name).read_text("utf-8")
        [twin] = [small for small in twins if small.removeprefix("papers/") in text]
        methods = {entry.name for entry in load_comparison(CONFIGS / name).compare.methods}
        assert {entry.name for entry in load_comparison(CONFIGS / twin).compare.methods} <= methods
        assert load_comparison(CONFIGS / name).compare.published


def test_the_demo_is_the_main_job_on_embedded_parts() -> None:
    recipe = load_recipe(CONFIGS / "demo.yaml")
    assert (recipe.model.name, recipe.method.name, len(recipe.tasks)) == ("embedded", "rlora", 6)
    assert {task.source.kind for task in recipe.tasks} == {"generator"}
    assert recipe.evaluate.before


def test_grpo_goes_on_from_the_demo() -> None:
    demo, more = (load_recipe(CONFIGS / f"{name}.yaml") for name in ("demo", "grpo"))
    assert more.init_from == demo.output
    assert (more.model, more.method, more.tasks) == (demo.model, demo.method, demo.tasks)
    assert more.train.objective == "grpo"
    assert more.train.grpo is not None
    assert more.train.batch_size == len(more.tasks) * more.train.grpo.num_generations


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
