"""A text is worth what its task's own scorer says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from multiflora.recipe import Recipe, recipe_from
from multiflora.tasks.load import load_split
from multiflora.training.rewards import load_rewards, rewards_of


def make_recipe(folder: Path) -> Recipe:
    files = {
        "numbers": '{{"prompt": "{i} + 1 =", "completion": " {j}", "answer": {j}}}',
        "words": '{{"prompt": "word {i}", "completion": " w{i} x", "answer": "w{i} x"}}',
        "chosen": '{{"prompt": "is {i} even?", "choices": [" no", " yes"], "answer": {k}}}',
    }
    for name, row in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(row.format(i=i, j=i + 1, k=1 - i % 2) for i in range(20)))
    made = {"name": "sums", "source": {"generator": "chain_sum", "settings": {"min_terms": 2, "max_terms": 2}}}
    tasks: list[Any] = [*(str(folder / f"{name}.jsonl") for name in files), made]
    train = {"objective": "grpo"}
    return recipe_from({"model": "m", "method": "lora", "tasks": tasks, "train": train, "output": "out"})


@pytest.mark.parametrize("number", [0, 3])
def test_rewards_are_the_tasks_own_scores(tmp_path: Path, number: int) -> None:
    recipe = make_recipe(tmp_path)
    assert [task.score for task in recipe.tasks] == ["number", "exact", "choices", "verifier"]
    rewards = load_rewards(recipe)
    rows = [{**load_split(task, "train")[number], "task_id": i} for i, task in enumerate(recipe.tasks)]
    right = [row["completion"] for row in rows]
    assert rewards_of(rows, right, rewards) == [1.0] * 4
    # what comes after a task's stop does not count, and another row's answer is wrong
    assert rewards_of(rows[:2], [f"{right[0]}\n\nand 99", f"{right[1]}\nmore"], rewards) == [1.0, 1.0]
    others = [load_split(task, "train")[number + 1]["completion"] for task in recipe.tasks]
    others[2] = next(choice for choice in rows[2]["choices"] if choice != right[2])
    assert rewards_of(rows, others, rewards)[:3] == [0.0] * 3
    assert rewards_of(rows, ["", "", "", ""], rewards)[:3] == [0.0] * 3
