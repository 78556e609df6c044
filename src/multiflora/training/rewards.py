"""What an answer is worth while a model learns from its own: the task's own score, or a function that the recipe names.

A function is named as ``module:function`` in ``train.grpo.rewards`` and nowhere else; no file of data can name one. It
is called with the row, a `multiflora.tasks.Example`, and the text that the model wrote, and returns a number.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from multiflora.errors import ConfigError
from multiflora.recipe import Recipe
from multiflora.suggest import did_you_mean, shown
from multiflora.tasks.example import Example
from multiflora.tasks.load import example_of
from multiflora.tasks.score import verify

__all__ = ["Reward", "load_rewards", "rewards_of"]

Reward = Callable[[Example, str], float]


def load_rewards(recipe: Recipe) -> list[Reward]:
    """Return each task's reward, in the order of the recipe.

    Args:
        recipe: Its tasks and ``train.grpo.rewards``.
    Raises:
        ConfigError: A function cannot be imported.
    """
    named = {} if recipe.train.grpo is None else recipe.train.grpo.rewards
    return [
        _imported(task.name, named[task.name]) if task.name in named else partial(verify, task) for task in recipe.tasks
    ]


def rewards_of(rows: Sequence[Mapping[str, Any]], texts: Sequence[str], rewards: Sequence[Reward]) -> list[float]:
    """Return what each text is worth.

    Args:
        rows: The row that each text answers: columns of `multiflora.tasks.load_split`, and ``task_id``.
        texts: What the model wrote.
        rewards: Each task's reward.
    Raises:
        ConfigError: A reward is no finite number.
    """
    found = []
    for row, text in zip(rows, texts, strict=True):
        example = example_of(str(row["task_id"]), row)
        value = rewards[row["task_id"]](example, text)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(
                f"train.grpo.rewards: the function gave {shown(value)} for a text to the row {example.id}; expected a "
                "finite number, larger for a better text. Mend the function."
            )
        found.append(float(value))
    return found


def _imported(task: str, entry: str) -> Reward:
    """Import a function by its ``module:function``."""
    where = f"train.grpo.rewards.{task}"
    module_name, _, name = entry.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"{where} is {entry}, but Python cannot import {module_name}: {error}. Install it, or put its folder into "
            "PYTHONPATH."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"{where} is {entry}, but {module_name} has no function {name}; {did_you_mean(name, there)}")
    reward: Reward = function
    return reward
