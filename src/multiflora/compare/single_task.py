"""One LoRA for each task: the trainings that many tasks at once are measured against.

Two sizes: ``each`` has the comparison's budget for every task, ``together`` has it for all tasks together. A task's
LoRA takes the task's share of a multi-task training's steps, so that all of them see what one such training sees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from multiflora.compare.budget import rank_key
from multiflora.compare.plan import Cell, Competitor, competitors, single_cell
from multiflora.compare.results import Summary
from multiflora.compare.spec import BudgetSpec, Comparison, Entry
from multiflora.compare.transfer import transfer_of, transfer_words
from multiflora.data.mixture import allocate, task_rates
from multiflora.errors import ConfigError
from multiflora.methods import describe
from multiflora.recipe import Recipe
from multiflora.tasks import load_split

__all__ = ["SIZES", "Single", "single_trainings", "steps_of_each", "with_single_tasks"]

SIZES = ("each", "together")
"""The budget for each task's LoRA, or for all of them together."""


@dataclass(frozen=True, kw_only=True)
class Single:
    """One training of one task's LoRA."""

    size: str
    task: str
    seed: int
    competitor: Competitor
    cell: Cell


def single_trainings(
    comparison: Comparison,
    planned: Sequence[Competitor],
    model_config: Any,
    rates: Mapping[str, float | None],
) -> list[Single]:
    """Plan all trainings of single tasks.

    Args:
        comparison: The comparison; nothing where it does not ask for them.
        planned: Its competitors.
        model_config: The base model's transformers config.
        rates: Label -> the learning rate that was found for it; that of the first LoRA is taken here, too.

    Raises:
        ConfigError: There is one task only, or a task would get no step.
    """
    spec = comparison.compare
    if not spec.single_task:
        return []
    tasks = comparison.recipe.tasks
    if len(tasks) < 2:
        raise ConfigError("compare.single_task is true, but there is one task only; add another, or set it to false.")
    own = next((entry for entry in spec.methods if entry.name == "lora"), Entry(name="lora", label="lora"))
    budget = next(item for item in planned if item.label == (spec.budget.of or spec.reference())).parameters
    targets = {"each": budget, "together": max(budget // len(tasks), 1)}
    lora = {size: _lora(comparison, own, target, model_config) for size, target in targets.items()}
    steps = steps_of_each(comparison.recipe)
    return [
        Single(
            size=size,
            task=task.name,
            seed=seed,
            competitor=lora[size],
            cell=single_cell(
                comparison, lora[size], task, seed, rates.get(own.label), steps[number], label=f"{size}-{task.name}"
            ),
        )
        for seed in spec.seeds
        for size in SIZES
        for number, task in enumerate(tasks)
    ]


def with_single_tasks(
    comparison: Comparison,
    summary: Summary,
    singles: Sequence[Single],
    found: Mapping[str, Mapping[str, Any]],
    done: Mapping[str, Mapping[str, Any]],
) -> Summary:
    """Add to a summary what the tasks gain or lose by being trained together, and say it in the answer.

    Args:
        comparison: The comparison.
        summary: Of all its methods.
        singles: The trainings of single tasks.
        found: Name -> cell, of the methods and the untrained model.
        done: Name -> cell, of the single tasks.
    """
    base = next(cell for cell in found.values() if cell["kind"] == "base")
    own = {(cell["label"], cell["seed"]): cell for cell in found.values() if cell["kind"] == "seed"}
    # a method that diverged has no numbers to compare
    labels = [row.label for row in summary.rows if row.tasks]
    by_label = {label: [own[label, seed] for seed in summary.seeds] for label in labels}
    transfers = []
    for size in SIZES:
        of = [single for single in singles if single.size == size and single.seed in summary.seeds]
        tasks = list(dict.fromkeys(single.task for single in of))
        transfers.append(
            transfer_of(
                size,
                by_label,
                {task: [done[single.cell.name] for single in of if single.task == task] for task in tasks},
                base,
                rank=of[0].competitor.rank,
                parameters=of[0].competitor.parameters * len(tasks),
                matrix=comparison.compare.transfer,
            )
        )
    return replace(
        summary,
        single_task=tuple(transfers),
        answer=" ".join(filter(None, (summary.answer, transfer_words(transfers)))),
    )


def _lora(comparison: Comparison, own: Entry, target: int, model_config: Any) -> Competitor:
    """The LoRA whose parameters come nearest to a number."""
    rank = rank_key(describe("lora"))
    entry = own.model_copy(update={"label": "single", "settings": {k: v for k, v in own.settings.items() if k != rank}})
    shared = {key: value for key, value in comparison.compare.shared.items() if key != rank}
    spec = comparison.compare.model_copy(
        update={"methods": (entry,), "shared": shared, "baseline": "single", "budget": BudgetSpec(target=target)}
    )
    return competitors(comparison.model_copy(update={"compare": spec}), model_config)[0]


def steps_of_each(recipe: Recipe) -> list[int]:
    """Split a run's optimiser steps among its tasks, in their shares of the mixture.

    Args:
        recipe: The recipe; its tasks are read where the shares or the number of steps follow from their sizes.

    Raises:
        ConfigError: There are fewer steps than tasks.
    """
    wanted, train = recipe.mixture, recipe.train
    known = train.max_steps is not None and wanted.strategy in ("weights", "equal")
    sizes = [1] * len(recipe.tasks) if known else [len(load_split(task, "train")) for task in recipe.tasks]
    shares = task_rates(
        wanted.strategy,
        sizes,
        weights=[task.weight for task in recipe.tasks],
        temperature=wanted.temperature,
        cap=wanted.cap,
    )
    examples = wanted.epoch_size or sum(min(size, wanted.cap or size) for size in sizes)
    per_step = train.batch_size * train.gradient_accumulation
    steps = train.max_steps or math.ceil(max(1, round(train.epochs * examples)) / per_step)
    if steps < len(recipe.tasks):
        raise ConfigError(
            f"compare.single_task trains one LoRA for each of {len(recipe.tasks)} tasks, and the recipe has {steps} "
            "steps for all of them. Raise train.max_steps or train.epochs."
        )
    return allocate(shares, steps)
