"""One LoRA for each task: the trainings that many tasks at once are measured against.

Two sizes: ``each`` has the comparison's budget for every task, ``together`` has it for all tasks together. A task's
LoRA takes the task's share of a multi-task training's steps, so that all of them see what one such training sees.
Each size is tuned as a method is: one rate for all its tasks, chosen from the methods' own grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from multiflora.comparison.budget import rank_key
from multiflora.comparison.plan import Cell, Competitor, competitors, single_cell, single_trial_cell
from multiflora.comparison.results import Summary
from multiflora.comparison.search import trial_of
from multiflora.comparison.spec import BudgetSpec, Comparison, Entry, command_of
from multiflora.comparison.transfer import SIZES, size_words, transfer_of, transfer_words
from multiflora.comparison.tuning import Trial, Tuning, not_tuned, waits_for
from multiflora.data.mixture import allocate, task_rates
from multiflora.errors import ConfigError
from multiflora.evaluation.results import macro_average
from multiflora.methods import describe
from multiflora.recipe import Recipe
from multiflora.tasks import load_split

__all__ = [
    "Single",
    "single_loras",
    "single_trainings",
    "single_trials",
    "steps_of_each",
    "trials_of_sizes",
    "with_single_tasks",
]


@dataclass(frozen=True, kw_only=True)
class Single:
    """One training of one task's LoRA."""

    size: str
    task: str
    seed: int
    competitor: Competitor
    cell: Cell


def single_loras(comparison: Comparison, planned: Sequence[Competitor], model_config: Any) -> dict[str, Competitor]:
    """Solve the rank of a task's LoRA, for each size.

    Args:
        comparison: The comparison.
        planned: Its competitors.
        model_config: The base model's transformers config.

    Raises:
        ConfigError: There is one task only, or a task would get no step.
    """
    spec, tasks = comparison.compare, comparison.recipe.tasks
    if len(tasks) < 2:
        raise ConfigError("compare.single_task is true, but there is one task only; add another, or set it to false.")
    _trial_steps(comparison)  # the fewest of all: refused before anything is trained
    own = next((entry for entry in spec.methods if entry.name == "lora"), Entry(name="lora", label="lora"))
    budget = next(item for item in planned if item.label == (spec.budget.of or spec.reference())).parameters
    targets = {"each": budget, "together": max(budget // len(tasks), 1)}
    return {size: _lora(comparison, own, targets[size], model_config) for size in SIZES}


def single_trainings(
    comparison: Comparison, loras: Mapping[str, Competitor], rates: Mapping[str, float]
) -> list[Single]:
    """Plan the trainings that are scored on the test rows.

    Args:
        comparison: The comparison.
        loras: Size -> a task's LoRA.
        rates: Size -> the learning rate that was found for it; a size without one takes what a LoRA is trained with.
    """
    steps = steps_of_each(comparison.recipe)
    return [
        Single(
            size=size,
            task=task.name,
            seed=seed,
            competitor=lora,
            cell=single_cell(comparison, lora, task, seed, rates.get(size), number, label=f"{size}-{task.name}"),
        )
        for seed in comparison.compare.seeds
        for size, lora in loras.items()
        for task, number in zip(comparison.recipe.tasks, steps, strict=True)
    ]


def single_trials(comparison: Comparison, loras: Mapping[str, Competitor], grid: Sequence[float]) -> list[Single]:
    """Plan the search for each size's learning rate: every task's LoRA with every rate, scored on validation rows."""
    search, steps = comparison.compare.learning_rate, _trial_steps(comparison)
    assert search is not None
    return [
        Single(
            size=size,
            task=task.name,
            seed=seed,
            competitor=lora,
            cell=single_trial_cell(comparison, lora, task, seed, rate, number, label=f"{size}-{task.name}"),
        )
        for seed in comparison.compare.seeds[: search.seeds]
        for rate in grid
        for size, lora in loras.items()
        for task, number in zip(comparison.recipe.tasks, steps, strict=True)
    ]


def _trial_steps(comparison: Comparison) -> list[int]:
    """Each task's steps in a trial; those of its training where nothing is searched, or trials run in full."""
    search, recipe = comparison.compare.learning_rate, comparison.recipe
    if search is not None and search.max_steps is not None:
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_steps": search.max_steps})})
    return steps_of_each(recipe)


def trials_of_sizes(singles: Sequence[Single], done: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Trial]]:
    """Read what the search came to: size -> one trial for each rate and seed, all tasks' LoRAs together.

    Args:
        singles: The search's trainings.
        done: Name -> cell.
    """
    together: dict[tuple[str, float, int], list[Mapping[str, Any]]] = {}
    for single in singles:
        cell = done[single.cell.name]
        together.setdefault((single.size, cell["learning_rate"], single.seed), []).append(cell)
    found: dict[str, list[Trial]] = {}
    for (size, _, _), cells in together.items():
        found.setdefault(size, []).append(trial_of(_as_one(cells)))
    return found


def _as_one(cells: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Cells of one task each as if one training had been scored on all tasks; it diverged if one of them did."""
    diverged = [cell for cell in cells if not cell["scores"]["tasks"]]
    if diverged:
        return diverged[0]
    tasks = {task: score for cell in cells for task, score in cell["scores"]["tasks"].items()}
    rows = {task: own for cell in cells for task, own in cell["rows"].items()}
    return {**cells[0], "rows": rows, "scores": {"tasks": tasks, "macro": macro_average(tasks)}}


def with_single_tasks(
    comparison: Comparison,
    summary: Summary,
    singles: Sequence[Single],
    tunings: Mapping[str, Tuning],
    found: Mapping[str, Mapping[str, Any]],
    done: Mapping[str, Mapping[str, Any]],
) -> Summary:
    """Add to a summary what the tasks gain or lose by being trained together, and say it in the answer.

    Args:
        comparison: The comparison.
        summary: Of all its methods.
        singles: The trainings of single tasks.
        tunings: Size -> how well its learning rate is known; a size that is not there is not tuned.
        found: Name -> cell, of the methods and the untrained model.
        done: Name -> cell, of the single tasks.
    """
    base = next(cell for cell in found.values() if cell["kind"] == "base")
    own = {(cell["label"], cell["seed"]): cell for cell in found.values() if cell["kind"] == "seed"}
    # a method that diverged has no numbers to compare
    labels = [row.label for row in summary.rows if row.tasks]
    by_label = {label: [own[label, seed] for seed in summary.seeds] for label in labels}
    of_methods = {row.label: row.tuning for row in summary.rows if row.tuning is not None}
    command = command_of(comparison)
    transfers = []
    for size in SIZES:
        of = [single for single in singles if single.size == size and single.seed in summary.seeds]
        tasks = list(dict.fromkeys(single.task for single in of))
        name = f"one LoRA per task {size_words(size)}"
        known = of_methods | ({name: tunings[size]} if size in tunings else {})
        transfers.append(
            transfer_of(
                size,
                by_label,
                {task: [done[single.cell.name] for single in of if single.task == task] for task in tasks},
                base,
                rank=of[0].competitor.rank,
                parameters=of[0].competitor.parameters * len(tasks),
                matrix=comparison.compare.transfer,
                tuning=tunings.get(size) or not_tuned(done[of[0].cell.name]["learning_rate"]),
                missing={label: waits_for((label, name), known, command) for label in labels},
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
