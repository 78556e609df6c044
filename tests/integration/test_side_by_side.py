"""Several runs scored on one load of their base model: each as it is scored alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from multiflora.cli.evaluate import evaluate as command
from multiflora.errors import AdapterError, ConfigError
from multiflora.evaluation import side_by_side
from multiflora.evaluation.load import load_base
from multiflora.evaluation.run import evaluate
from multiflora.evaluation.side_by_side import evaluate_side_by_side
from multiflora.recipe import Recipe
from multiflora.training.adapter import add_adapter, save_adapter
from tests.integration.toys import make_recipe, make_tokenizer


@pytest.fixture
def base(tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> Path:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    model = tiny_llama(vocab_size=len(tokenizer), initializer_range=0.2, eos_token_id=1, attention_bias=True)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def leave_run(base: Path, name: str, method: Any, **changes: Any) -> Path:
    """What a training leaves: a recipe, and an adapter that has learned something."""
    recipe = make_recipe(base.parent, method, model=str(base))
    recipe = recipe.model_copy(update={"output": base.parent / name, **changes})
    model = add_adapter(load_base(recipe.model)[0], recipe)
    torch.manual_seed(len(name))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.3 * torch.randn_like(weight)
    save_adapter(model, recipe.output)
    return write_recipe(recipe)


def write_recipe(recipe: Recipe) -> Path:
    recipe.output.mkdir(exist_ok=True)
    (recipe.output / "recipe.yaml").write_text(recipe.to_yaml(recipe.output))
    return recipe.output


def scored(evaluate: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    return {"evaluate": recipe.evaluate.model_copy(update=evaluate)}


def test_each_run_scores_what_it_scores_alone_and_the_base_is_loaded_once(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # the first adapter writes biases into its model: the others must not see them
    methods = {"one": {"name": "lora", "bias": "all"}, "two": "mtllora", "three": "prompt", "four": "rlora"}
    runs = {name: leave_run(base, name, method) for name, method in methods.items()}
    alone = {name: evaluate(run, limit=4) for name, run in runs.items()}
    plain = evaluate(base, tasks=make_recipe(base.parent, "lora").tasks, limit=4, batch_size=4, progress=False)
    loads: list[Any] = []
    monkeypatch.setattr(side_by_side, "load_base", lambda *words: loads.append(words) or load_base(*words))
    found = evaluate_side_by_side(list(runs.values()), limit=4, progress=False)
    assert len(loads) == 1
    assert found.adapters == alone
    assert found.base == plain
    assert len({json.dumps(results) for results in [plain, *alone.values()]}) == 5

    command([str(runs["two"]), str(runs["four"])], tasks=["echo"], limit=4)
    head, row, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == ["task", "n", "metric", "base", "two", "four"]
    assert row.split()[:3] == ["echo", "4", "acc"]
    command([str(runs["two"]), str(runs["four"])], tasks=["echo"], limit=4, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["adapters"]["four"]["tasks"]["echo"] == alone["four"]["tasks"]["echo"]
    assert list(told["base"]["tasks"]) == ["echo"]


def test_a_task_that_an_adapter_cannot_route_is_left_out_for_it(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    echo, following = make_recipe(base.parent, "lora").tasks
    both, one = leave_run(base, "both", "lora"), leave_run(base, "one", "mtllora", tasks=(echo,))
    found = evaluate_side_by_side([one, both], limit=2, progress=False)
    assert list(found.base["tasks"]) == ["echo", "next"]
    assert list(found.adapters["one"]["tasks"]) == ["echo"]
    assert list(found.adapters["both"]["tasks"]) == ["echo", "next"]
    assert found.base["macro"] == found.base["tasks"]["echo"]["score"]
    assert found.adapters["one"]["macro"] is None
    assert "one routes by task and was not trained on next; it is not scored on them" in caplog.text
    with pytest.raises(
        ConfigError, match=r"one routes by task and was trained on none of those to score\. It knows echo"
    ):
        evaluate_side_by_side([one, both], [following.name], limit=2, progress=False)


def test_runs_that_cannot_stand_side_by_side_are_refused(base: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, "lora", model=str(base))
    first = leave_run(base, "first", "lora")

    def beside(**changes: Any) -> None:
        other = write_recipe(recipe.model_copy(update={"output": tmp_path / "other", **changes}))
        for path in first.glob("adapter_*"):
            (other / path.name).write_bytes(path.read_bytes())
        evaluate_side_by_side([first, other], limit=2, progress=False)

    model = recipe.model.model_copy(update={"name": "another/model"})
    with pytest.raises(
        ConfigError, match=r"The base model of other is another/model and that of first is .*one by one"
    ):
        beside(model=model)
    with pytest.raises(ConfigError, match=r"evaluate.split of other is validation and .* Choose one with --split"):
        beside(**scored({"split": "validation"}, recipe))
    changed = recipe.tasks[0].model_copy(update={"few_shot": 2})
    with pytest.raises(ConfigError, match="Task echo is not the same in other as in first"):
        beside(tasks=(changed,))
    with pytest.raises(ConfigError, match=r"other holds a whole model \(method full\), and no adapter"):
        beside(method=recipe.method.model_copy(update={"name": "full", "settings": {}}))
    with pytest.raises(ConfigError, match=r"first is named twice"):
        evaluate_side_by_side([first, first])
    with pytest.raises(ConfigError, match=r"model is no run's output folder \(it has no recipe.yaml\)"):
        evaluate_side_by_side([first, base])
    with pytest.raises(ConfigError, match="There are no runs to score"):
        evaluate_side_by_side([])
    (first / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match="first holds no adapter"):
        evaluate_side_by_side([first])


def test_folders_of_one_name_are_told_apart_by_their_places(base: Path) -> None:
    places = []
    for place in ("a", "b"):
        (base.parent / place).mkdir()
        places.append(leave_run(base, f"{place}/run", "lora"))
    found = evaluate_side_by_side(places, ["echo"], limit=1, progress=False)
    assert list(found.adapters) == [str(place) for place in places]
