"""LoraHub in a recipe: what cannot work is refused, the steps are the mixture's, a few examples of every task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from multiflora.data.mixture import Mixture
from multiflora.data.prepare import encode_tasks
from multiflora.errors import ConfigError
from multiflora.jobs.lorahub import check_lorahub, few_examples, steps_of_tasks
from tests.integration.toys import make_recipe, make_tokenizer


def test_every_task_has_its_share_of_the_steps() -> None:
    mixture = Mixture(names=("a", "b"), sizes=(9, 9), counts=(9, 3), seed=0)
    assert steps_of_tasks(mixture, 8) == [6, 2]
    assert steps_of_tasks(mixture, 2) == [1, 1]
    with pytest.raises(ConfigError, match="The run has 1 steps for 2 tasks"):
        steps_of_tasks(mixture, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": 1}, "there is one task. Add another"),
        ({"save_every": 5}, "train.save_every is 5, but lorahub trains a LoRA for each task"),
        ({"processes": "2"}, "method is lorahub, and 2 processes were started"),
    ],
)
def test_what_cannot_work_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    pytest.importorskip("nevergrad")
    check_lorahub(make_recipe(tmp_path, "lorahub"))
    recipe = make_recipe(tmp_path, "lorahub", **{k: v for k, v in changes.items() if k == "save_every"})
    recipe = recipe.model_copy(update={"tasks": recipe.tasks[: changes.get("tasks")]})
    monkeypatch.setenv("WORLD_SIZE", changes.get("processes", "1"))
    with pytest.raises(ConfigError, match=message):
        check_lorahub(recipe)


def test_a_few_examples_of_every_task_are_drawn_by_the_seed(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    examples = encode_tasks(make_recipe(tmp_path, "lorahub"), tokenizer)
    few = few_examples(examples, 5)
    assert [one.task for one in few] == ["echo"] * 5 + ["next"] * 5
    rows = {(tuple(row["input_ids"]), row["task_id"]) for row in examples.store}
    assert len({tuple(one.ids) for one in few}) == 10
    assert all((tuple(one.ids), ["echo", "next"].index(one.task)) in rows for one in few)
    assert few == few_examples(examples, 5)
    assert few != few_examples(encode_tasks(make_recipe(tmp_path, "lorahub", seed=1), tokenizer), 5)
    assert len(few_examples(examples, 1000)) == len(examples.store)
