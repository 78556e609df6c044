"""From a comparison to cells: equal budgets, complete recipes, names that change with what is computed."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from multiflora.comparison.clock import clock_cells, in_time
from multiflora.comparison.plan import base_cell, clock_cell, competitors, seed_cell, trial_cell
from multiflora.comparison.search import first_rates
from multiflora.comparison.spec import BudgetSpec, load_comparison
from multiflora.errors import ConfigError, MultifloraError
from multiflora.methods import build_config
from multiflora.yaml_file import parse_yaml

CONFIG = LlamaConfig(vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)


def comparison(methods: list[Any], *, train: dict[str, Any] | None = None, **section: Any) -> Any:
    return load_comparison(
        {
            "model": "embedded",
            "tasks": ["rg_chain_sum", "rg_spell_backward"],
            "train": train or {},
            "evaluate": {"extra_tasks": ["rg_letter_counting"]},
            "output": "out",
            "compare": {"methods": methods, **section},
        }
    )


def planned(methods: list[Any], **section: Any) -> dict[str, Any]:
    return {item.label: item for item in competitors(comparison(methods, **section), CONFIG)}


ALL = [
    {"lora": {"r": 32}},
    "multilora",
    "hydralora",
    "rlora",
    "mlora",
    {"moelora": {"num_experts": 4}},
    {"loramoe": {"num_experts": 4}},
    "mtllora",
]


@pytest.mark.parametrize("equal", ["parameters", "flops"])
def test_all_methods_come_to_the_baseline_s_budget(equal):
    found = planned(ALL, budget={"equal": equal})
    cost = {k: v.parameters if equal == "parameters" else v.flops.training for k, v in found.items()}
    for label, value in cost.items():
        # ranks are whole numbers: one more of four experts' is an eighth of this budget
        assert value == pytest.approx(cost["lora"], rel=0.065), label
        assert found[label].solved == (label != "lora")


def test_heads_by_block_are_in_the_budget_and_fit_the_model():
    found = planned([{"lora": {"r": 64}}, {"mixlora": {"num_experts": [3, 5]}}])
    mixed, lora = found["mixlora"], found["lora"]
    assert mixed.solved
    assert mixed.parameters == pytest.approx(lora.parameters, rel=0.05)
    for numbers in ([3], [3, 4, 5]):
        with pytest.raises(MultifloraError, match=rf"num_experts has {len(numbers)} numbers, and model.layers"):
            planned(["lora", {"mixlora": {"num_experts": numbers}}])


def test_the_budget_may_be_another_method_s_or_a_number():
    found = planned(["lora", {"rlora": {"r": 8}}], budget={"of": "rlora"})
    assert found["lora"].parameters == pytest.approx(found["rlora"].parameters, rel=0.05)
    assert found["rlora"].rank == 8
    assert planned(["lora"], budget={"target": 100_000})["lora"].parameters == pytest.approx(100_000, rel=0.05)


def test_a_given_rank_stays():
    found = planned([{"lora": {"r": 16}}, {"name": "rlora", "r": 3, "label": "mine"}])
    assert (found["mine"].rank, found["mine"].solved) == (3, False)


def test_without_a_budget_every_rank_is_the_default_or_the_given_one():
    found = planned(["lora", "rlora", {"name": "rlora", "label": "six", "r": 6}], budget={"equal": "nothing"})
    assert {label: item.rank for label, item in found.items()} == {"lora": 8, "rlora": 4, "six": 6}


def test_scale_is_kept_whatever_the_rank():
    found = planned([{"name": "lora", "r": 16, "scale": 2}, {"name": "rlora", "scale": 2}, "hydralora"])
    assert found["lora"].settings["lora_alpha"] == 32
    assert found["rlora"].settings["lora_alpha"] == 2 * found["rlora"].rank
    assert found["hydralora"].settings["lora_alpha"] == 8 * found["hydralora"].rank  # 32 at its default rank of 4


def test_shared_settings_go_to_the_methods_that_have_them():
    found = planned(["lora", "rlora"], shared={"target_modules": ["up_proj"], "head_dropout": 0.3})
    assert found["rlora"].settings["head_dropout"] == 0.3
    assert "head_dropout" not in found["lora"].settings
    assert found["lora"].parameters == 2 * 8 * (256 + 512)


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(ConfigError, match=r"method\.target_modules is .'nowhere'."):
        planned(["lora"], shared={"target_modules": ["nowhere"]})


def test_a_cell_is_complete():
    plan = comparison(["lora", {"name": "rlora", "train": {"weight_decay": 0.1}}], train={"max_steps": 9})
    item = competitors(plan, CONFIG)[1]
    cell = seed_cell(plan, item, 5, learning_rate=0.003)
    recipe = cell.recipe
    assert (recipe.method.name, recipe.seed) == ("rlora", 5)
    assert recipe.method.settings["r"] == item.rank
    assert (recipe.train.max_steps, recipe.train.weight_decay, recipe.train.learning_rate) == (9, 0.1, 0.003)
    assert not recipe.evaluate.before
    assert recipe.output == plan.recipe.output / "runs" / cell.name


def test_a_changed_recipe_is_another_cell_and_the_folder_is_not():
    def name(train: dict[str, Any], seed: int = 0, output: str = "out") -> str:
        plan = comparison(["lora"], train=train)
        plan = plan.model_copy(
            update={"recipe": plan.recipe.model_copy(update={"output": plan.recipe.output.parent / output})}
        )
        return seed_cell(plan, competitors(plan, CONFIG)[0], seed).name

    assert name({"max_steps": 3}) == name({"max_steps": 3}, output="elsewhere")
    assert len({name({"max_steps": 3}), name({"max_steps": 4}), name({"max_steps": 3}, seed=1)}) == 3


def test_a_trial_of_full_length_is_the_training_of_a_seed_scored_on_the_validation_split():
    plan = comparison(["lora"], learning_rate={})
    item = competitors(plan, CONFIG)[0]
    trial, seed = trial_cell(plan, item, 2, 0.01), seed_cell(plan, item, 2, 0.01)
    assert (trial.recipe.output, trial.name) != (seed.recipe.output, seed.name)
    assert trial.recipe.output == seed.recipe.output
    assert (trial.recipe.evaluate.split, trial.recipe.evaluate.extra_tasks) == ("validation", ())
    same = {"evaluate": None}
    assert trial.training.model_copy(update=same) == seed.training.model_copy(update=same)
    assert len({trial_cell(plan, item, 2, 0.02).name, trial_cell(plan, item, 1, 0.01).name, trial.name}) == 3


def test_scores_during_training_are_of_the_rows_that_are_told_of():
    plan = comparison(["lora"], learning_rate={})
    during = plan.recipe.evaluate.model_copy(update={"during": (0.5,)})
    plan = plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"evaluate": during})})
    item = competitors(plan, CONFIG)[0]
    trial = trial_cell(plan, item, 0, 0.01)
    assert trial.training == seed_cell(plan, item, 0, 0.01).recipe
    assert trial.training.evaluate.split == "test"


def with_best(methods: list[Any]) -> Any:
    plan = comparison(methods)
    kept = {"every": 2, "keep_best": "macro", "early_stopping_patience": 3}
    evaluate = plan.recipe.evaluate.model_copy(update=kept)
    return plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"evaluate": evaluate})})


def test_steps_are_timed_without_scores_on_the_way():
    plan = with_best(["lora"])
    found = clock_cell(plan, competitors(plan, CONFIG)[0], 0, 5).recipe.evaluate
    assert (found.every, found.keep_best, found.early_stopping_patience) == (None, None, None)
    assert seed_cell(plan, competitors(plan, CONFIG)[0], 0).recipe.evaluate.keep_best == "macro"


def test_a_method_without_an_earlier_best_is_refused_before_any_training():
    plan = with_best(["lora", "adalora"])
    with pytest.raises(ConfigError, match=r"evaluate\.keep_best is 'macro', but adalora takes ranks away"):
        competitors(plan, CONFIG)


def test_a_short_trial_is_a_training_of_its_own():
    plan = comparison(["lora"], learning_rate={"max_steps": 4})
    item = competitors(plan, CONFIG)[0]
    trial = trial_cell(plan, item, 0, 0.01)
    assert trial.recipe.output != seed_cell(plan, item, 0, 0.01).recipe.output
    assert (trial.recipe.train.max_steps, trial.training) == (4, trial.recipe)


def test_the_base_model_is_scored_on_the_same_rows():
    plan = comparison(["lora"])
    trained = seed_cell(plan, competitors(plan, CONFIG)[0], 0).recipe
    assert base_cell(plan).recipe.evaluate == trained.evaluate


def test_the_search_tries_the_recipe_s_rate_and_the_usual_ones():
    methods = ["lora", "ia3", {"name": "dora", "train": {"learning_rate": 0.5}}]
    plan = comparison(methods, learning_rate={})
    assert {2e-4, 3e-3, 0.5} <= set(first_rates(plan, competitors(plan, CONFIG)))
    given = comparison(methods, learning_rate={"low": 1e-6}, train={"learning_rate": 5e-3})
    rates = first_rates(given, competitors(given, CONFIG))
    assert {2e-4, 3e-3, 0.5, 5e-3} <= set(rates)
    assert (rates[0], rates[-1]) == (1e-6, 0.5)


def test_equal_time_is_equal_parameters_and_steps_by_speed():
    plan = comparison(["lora", "rlora"], budget="time", train={"max_steps": 100})
    items = competitors(plan, CONFIG)
    same = competitors(comparison(["lora", "rlora"]), CONFIG)
    assert [item.rank for item in items] == [item.rank for item in same]
    cells = clock_cells(plan, items)
    assert len({cell.name for cell in cells}) == 6
    speeds = {"lora": [900.0, 1000.0, 1100.0], "rlora": [100.0, 800.0, 810.0]}
    found = [{"label": cell.label, "speeds": [speeds[cell.label][cell.number]]} for cell in cells]
    steps = [seed_cell(plan, item, 0).recipe.train.max_steps for item in in_time(plan, items, found)]
    assert steps == [100, 80]
    other = plan.model_copy(
        update={"compare": plan.compare.model_copy(update={"budget": BudgetSpec(equal="time", of="rlora")})}
    )
    steps = [seed_cell(other, item, 0).recipe.train.max_steps for item in in_time(other, items, found)]
    assert steps == [125, 100]


def test_without_a_learning_rate_each_method_has_its_own():
    plan = comparison(["lora", "ia3", "full", {"name": "dora", "train": {"learning_rate": 0.5}}])
    rates = {item.label: seed_cell(plan, item, 0).recipe.train.learning_rate for item in competitors(plan, CONFIG)}
    assert rates == {"lora": 2e-4, "ia3": 3e-3, "full": 2e-5, "dora": 0.5}
    again = load_comparison(parse_yaml(plan.to_yaml(), "again"))
    assert again == plan
    assert "learning_rate" not in again.recipe.train.model_fields_set
    given = comparison(["lora", "ia3"], train={"learning_rate": 1e-3})
    assert {seed_cell(given, i, 0).recipe.train.learning_rate for i in competitors(given, CONFIG)} == {1e-3}


def test_methods_without_a_rank_are_counted_on_the_model():
    found = planned(["lora", "full", "losparse", "ia3", "prompt", "prefix", "ptuning"])
    assert found["full"].parameters > 10 * found["lora"].parameters
    assert found["losparse"].parameters > 10 * found["lora"].parameters
    assert found["prompt"].parameters == 20 * 256
    assert found["prefix"].parameters == 20 * 2 * 2 * 256
    assert all(found[label].rank is None for label in found if label != "lora")


def test_lorahub_counts_for_the_lora_that_results():
    found = planned(["lora", "lorahub"], budget={"target": 50_000})
    assert (found["lorahub"].rank, found["lorahub"].parameters) == (found["lora"].rank, found["lora"].parameters)
    assert found["lorahub"].flops == found["lora"].flops


def test_adalora_s_last_rank_follows_its_first():
    found = planned(["lora", "adalora"], budget={"target": 50_000})["adalora"]
    assert found.settings["init_r"] == found.rank > 2
    assert build_config("adalora", found.settings).target_r == 2 * found.rank // 3
