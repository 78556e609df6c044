"""LoraHub as a method of a recipe: a LoRA for each task, then one of them all, weighed on a few examples.

Each LoRA starts alike and sees its own task alone, for that task's share of the recipe's steps, so a run takes as many
steps as any other method's. Then `multiflora.export.lorahub` searches the weights on a few training examples of every
task; the model is left with the blended factors, a plain LoRA of the same rank.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from multiflora.data.mixture import Mixture, allocate
from multiflora.data.prepare import Examples, encode_tasks
from multiflora.errors import ConfigError, Interrupted
from multiflora.export.compose import Composition
from multiflora.export.examples import Tokens
from multiflora.export.few_shot import FewShotLoss, factors_of, put_factors
from multiflora.export.lorahub import load_nevergrad, search
from multiflora.recipe import Recipe
from multiflora.training.baselines import training_settings
from multiflora.training.checkpoint import CHECKPOINTS
from multiflora.training.fit import fit, order_examples
from multiflora.training.processes import num_processes

__all__ = ["check_lorahub", "few_examples", "fit_and_compose", "steps_of_tasks"]

log = logging.getLogger(__name__)


def check_lorahub(recipe: Recipe) -> None:
    """Refuse what cannot work, before anything is read.

    Raises:
        ConfigError: There is one task only, or checkpoints are asked for, or there are several processes.
        EnvironmentProblem: The package that searches is not installed.
    """
    if len(recipe.tasks) < 2:
        raise ConfigError(
            "method is lorahub, which puts the LoRAs of several tasks together, but there is one task. Add another, or "
            "take the method lora."
        )
    if recipe.train.save_every is not None:
        raise ConfigError(
            f"train.save_every is {recipe.train.save_every}, but lorahub trains a LoRA for each task, one after the "
            "other, and has no checkpoint to go on from. Leave it out (in a comparison, write train: {save_every: "
            "null} beside the method)."
        )
    if num_processes() > 1:
        raise ConfigError(
            f"method is lorahub, and {num_processes()} processes were started; it trains and searches in one. Start it "
            "without torchrun or accelerate launch."
        )
    load_nevergrad()


def steps_of_tasks(mixture: Mixture, steps: int) -> list[int]:
    """Split a run's optimiser steps among its tasks, in the shares of the mixture.

    Args:
        mixture: How often each task is drawn.
        steps: Of the whole run; at least one for each task.

    Raises:
        ConfigError: There are fewer steps than tasks.

    Example:
        >>> steps_of_tasks(Mixture(names=("a", "b"), sizes=(9, 9), counts=(9, 3), seed=0), 8)
        [6, 2]
    """
    if steps < len(mixture.names):
        raise ConfigError(
            f"The run has {steps} steps for {len(mixture.names)} tasks, and lorahub trains a LoRA for each. Raise "
            "train.max_steps or train.epochs."
        )
    return allocate(mixture.counts, steps)


def few_examples(examples: Examples, number: int) -> list[Tokens]:
    """Draw a few training examples of every task, by the mixture's seed.

    Args:
        examples: All of them.
        number: Of each task; all, where there are fewer.
    """
    draw = np.random.default_rng(examples.mixture.seed)
    first, chosen = 0, []
    for size in examples.mixture.sizes:
        chosen += [first + int(i) for i in draw.permutation(size)[:number]]
        first += size
    rows = examples.store.select(chosen)
    return [Tokens(list(row["input_ids"]), list(row["labels"]), examples.mixture.names[row["task_id"]]) for row in rows]


def fit_and_compose(
    model: Any, tokenizer: Any, recipe: Recipe, examples: Examples, *, quiet: bool = False
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]], Composition]:
    """Train a LoRA for each task and leave the model with the one that is blended of them.

    Args:
        model: The base model with a plain LoRA as it starts.
        tokenizer: The model's tokenizer.
        recipe: The recipe.
        examples: The tasks' examples and their mixture.
        quiet: Show no progress.

    Returns:
        What was trained on, task by task; the log, its steps counted on from task to task; and the weights.

    Raises:
        ConfigError: There are too few steps, or LoRA is put on something else than linear layers.
        Interrupted: SIGTERM came.
    """
    start = factors_of(model)
    if sum(parameter.requires_grad for parameter in model.parameters()) != 2 * len(start):
        raise ConfigError(
            f"method.target_modules is {recipe.method.settings.get('target_modules')!r}, which names modules that are "
            "no linear layers; lorahub weighs the two factors of linear layers. Leave the others out."
        )
    settings = training_settings(recipe)
    shares = steps_of_tasks(examples.mixture, order_examples(recipe, examples)[1])
    loras, reports, history, done = [], [], [], 0
    for task, steps in zip(recipe.tasks, shares, strict=True):
        log.info("A LoRA for %s, %d steps", task.name, steps)
        train = recipe.train.model_copy(update={"max_steps": steps})
        own = recipe.model_copy(update={"tasks": (task,), "train": train})
        put_factors(model, start)
        try:
            data, lines = fit(model, tokenizer, own, encode_tasks(own, tokenizer, model.config), quiet=quiet)
        except Interrupted as stopped:
            shutil.rmtree(recipe.output / CHECKPOINTS, ignore_errors=True)
            raise Interrupted(
                f"The run was asked to stop (SIGTERM) and did so while it trained the LoRA of {task.name}. lorahub "
                "cannot go on from there; start it again."
            ) from stopped
        loras.append(factors_of(model))
        reports.append(data.report)
        history += [line | {"step": line["step"] + done} if "step" in line else line for line in lines]
        done += steps
    loss = FewShotLoss(model, few_examples(examples, settings["examples"]))
    found = search(loras, loss, budget=settings["budget"], seed=recipe.seed)
    put_factors(model, found.pairs)
    names = tuple(task.name for task in recipe.tasks)
    made = Composition(
        recipe.output, names, found.weights, "lorahub", found.loss_before, found.loss_after, settings["budget"]
    )
    return _together(reports), history, made


def _together(reports: Iterable[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """What all trainings together have seen: the tasks' own counts, and their shares of the whole."""
    rows = {name: dict(row) for report in reports for name, row in report.items()}
    for what in ("examples", "tokens", "loss_tokens"):
        total = max(sum(row[what] for row in rows.values()), 1)
        for row in rows.values():
            row[f"share_of_{what}"] = row[what] / total
    return rows
