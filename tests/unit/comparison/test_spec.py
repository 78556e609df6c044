"""A comparison in YAML: what may be written, and what is refused with its reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from multiflora.comparison.spec import Comparison, load_comparison
from multiflora.errors import ConfigError


def plain(**section: Any) -> dict[str, Any]:
    return {
        "model": "embedded",
        "tasks": ["rg_chain_sum", "rg_spell_backward"],
        "output": "out",
        "compare": {"methods": ["lora", "rlora"], **section},
    }


def test_the_spellings_of_a_method_are_one():
    short, braced, long = (
        load_comparison(plain(methods=[entry])).compare.methods[0]
        for entry in ({"rlora": {"r": 8}}, {"name": "rlora", "r": 8}, {"name": "rlora", "settings": {"r": 8}})
    )
    assert short == braced == long
    assert (long.label, dict(long.settings)) == ("rlora", {"r": 8})


def test_two_variants_of_one_method_need_labels():
    with pytest.raises(ConfigError, match="'lora' twice; give one of them a label"):
        load_comparison(plain(methods=["lora", {"name": "lora", "r": 4}]))
    named = load_comparison(plain(methods=["lora", {"name": "lora", "r": 4, "label": "small"}]))
    assert [entry.label for entry in named.compare.methods] == ["lora", "small"]


def test_seeds_may_be_a_number():
    assert load_comparison(plain(seeds=4)).compare.seeds == (0, 1, 2, 3)
    assert load_comparison(plain(seeds=[7, 3])).compare.seeds == (7, 3)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"methods": ["lora", "r-lora"]}, r"compare: methods.1.name.*'r-lora' is not a method; did you mean rlora"),
        ({"seeds": [1, 1]}, "seeds are .1, 1.; expected at least one, all different"),
        ({"seeds": 0}, "expected at least one"),
        ({"baseline": "lor"}, "baseline is 'lor', which is no label of methods; did you mean lora"),
        ({"budget": {"of": "rlor"}}, "budget.of is 'rlor', which is no label of methods; did you mean rlora"),
        ({"budget": {"of": "lora", "target": 5}}, "both of .lora. and target .5. set the budget"),
        ({"budget": "tokens"}, "budget.equal is 'tokens'"),
        ({"budget": {"equal": "time", "target": 5}}, "target is set, but equal is 'time'"),
        ({"budget": "time"}, r"compare.budget is time, .* those of lora; set train.max_steps"),
        ({"learning_rate": {"seed": 7}}, "seed is no longer a key: trials are trained with the comparison's own seeds"),
        ({"learning_rate": {"seeds": 4}}, "learning_rate.seeds is 4, but there are 3 seeds"),
        ({"learning_rate": {"low": 1e-2, "high": 1e-3}}, "low must be the smaller one"),
        ({"seed": 3}, "seed is not a known key; did you mean seeds"),
        (
            {"published": [{"title": "t", "source": "s", "columns": ["a"], "rows": {"x": [1, 2]}}]},
            "rows.x has 2 numbers for 1 columns",
        ),
    ],
)
def test_what_cannot_work_is_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        load_comparison(plain(**section))


def test_a_recipe_without_the_section_is_refused():
    recipe = {key: value for key, value in plain().items() if key != "compare"}
    with pytest.raises(ConfigError, match="has no section 'compare'; expected a recipe with one more key"):
        load_comparison(recipe)


def test_a_recipe_that_goes_on_from_an_earlier_run_is_refused():
    with pytest.raises(ConfigError, match=r"init_from is .*first, but the methods of a comparison start alike"):
        load_comparison(plain() | {"init_from": "first"})


def test_a_recipe_with_a_method_of_its_own_is_refused():
    with pytest.raises(ConfigError, match="has both 'method' and 'compare'"):
        load_comparison(plain() | {"method": "lora"})


def test_problems_of_the_recipe_are_told_too():
    with pytest.raises(ConfigError, match=r"train\.learning_rat is not a known key; did you mean learning_rate"):
        load_comparison(plain() | {"train": {"learning_rat": 1}})


def test_overrides_reach_both_parts():
    found = load_comparison(plain(), ["compare.seeds=2", "compare.methods.1.r=6", "train.max_steps=7"])
    assert found.compare.seeds == (0, 1)
    assert found.compare.methods[1].settings == {"r": 6}
    assert found.recipe.train.max_steps == 7


def test_what_is_written_reads_back_equal(tmp_path: Path):
    found = load_comparison(
        plain(
            methods=["lora", {"name": "rlora", "label": "five", "num_heads": 5, "scale": 2.0, "train": {"epochs": 2}}],
            seeds=[4, 9],
            shared={"target_modules": ["up_proj"]},
            budget={"equal": "flops", "of": "lora"},
            learning_rate={"trials": 3},
            published=[{"title": "t", "source": "s", "columns": ["a", "b"], "rows": {"x": [1.5, None]}}],
        )
    )
    (tmp_path / "again.yaml").write_text(found.to_yaml(tmp_path))
    assert load_comparison(tmp_path / "again.yaml") == found


def test_a_budget_may_be_one_word():
    assert load_comparison(plain(budget="flops")).compare == load_comparison(plain(budget={"equal": "flops"})).compare


def test_a_search_has_validation_rows_of_every_task(tmp_path: Path):
    """Cut from the training rows where the source has none, and where the task sizes other splits only."""
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 9)
    task = {"name": "mine", "source": {"train": str(tmp_path / "mine.jsonl")}, "split_sizes": {"test": 0.5}}
    without = load_comparison(plain() | {"tasks": [task]})
    searched = load_comparison(plain(learning_rate={}) | {"tasks": [task]})
    assert without.recipe.tasks[0].split_sizes == {"test": 0.5}
    assert searched.recipe.tasks[0].split_sizes == {"test": 0.5, "validation": 0.1}


def test_a_comparison_is_taken_as_it_is():
    found = load_comparison(plain())
    assert isinstance(found, Comparison)
    assert load_comparison(found) is found


def test_the_baseline_is_lora_or_the_first():
    assert load_comparison(plain(methods=["rlora", "lora"])).compare.reference() == "lora"
    assert load_comparison(plain(methods=["rlora", "mlora"])).compare.reference() == "rlora"
    assert load_comparison(plain(baseline="rlora")).compare.reference() == "rlora"
