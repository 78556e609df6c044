"""From a comparison to its cells: one training each, every rank solved, every recipe complete."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from multiflora.base_model import load_config
from multiflora.comparison.budget import (
    Flops,
    adapted_widths,
    count_flops,
    count_on_meta,
    count_parameters,
    rank_key,
    solve_rank,
    with_rank,
)
from multiflora.comparison.spec import Comparison, Entry
from multiflora.errors import ConfigError
from multiflora.methods import METHODS, build_config, describe, settings_of
from multiflora.methods.per_layer import differ_by_block
from multiflora.recipe import MethodSpec, Recipe, TrainSpec
from multiflora.tasks.spec import TaskSpec
from multiflora.training.course import check_method

__all__ = [
    "Cell",
    "Competitor",
    "base_cell",
    "clock_cell",
    "competitors",
    "plan_of",
    "seed_cell",
    "single_cell",
    "single_trial_cell",
    "trial_cell",
]

Kind = Literal["base", "trial", "seed", "single", "clock"]

BASE = "base"
"""Label of the model as it is before training."""


@dataclass(frozen=True, kw_only=True)
class Competitor:
    """One method of a comparison, with the rank that meets the budget."""

    label: str
    name: str
    """The method."""
    settings: Mapping[str, Any]
    """All of them, the rank among them."""
    train: Mapping[str, Any]
    """What it needs otherwise in ``train``."""
    parameters: int
    """Trainable parameters."""
    flops: Flops | None
    """Operations that it adds to a token; None where no rank decides them."""
    rank: int | None
    solved: bool
    """Whether the rank was solved for, or stands as it was given."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training (or the scoring of the untrained model), complete in itself."""

    name: str
    """Its name in files: what it is, and a digest of its recipe. A changed recipe is another cell."""
    kind: Kind
    label: str
    number: int
    """The seed; of a clock, the round."""
    recipe: Recipe
    """What is trained, and how it is scored in this cell."""
    training: Recipe
    """What to train where the run's folder is empty: the same run may be scored in several cells, first in another."""


def plan_of(comparison: Comparison) -> list[Competitor]:
    """Solve every method's rank for the comparison's model; no weight is loaded."""
    return competitors(comparison, load_config(comparison.recipe.model))


def competitors(comparison: Comparison, model_config: Any) -> list[Competitor]:
    """Solve every method's rank.

    Args:
        comparison: The comparison.
        model_config: The base model's transformers config.

    Raises:
        ConfigError: A setting is unknown or cannot work, or the budget cannot be set by that method.
    """
    spec, budget = comparison.compare, comparison.compare.budget
    remote = comparison.recipe.model.trust_remote_code
    target = budget.target
    if budget.equal != "nothing" and target is None:
        label = budget.of or spec.reference()
        entry = next(entry for entry in spec.methods if entry.label == label)
        first = _as_given(comparison, entry, model_config)
        if first.flops is None:
            raise ConfigError(
                f"compare.budget: {label} has no rank, so it cannot set the budget of the others; name another "
                "method as budget.of, or give budget.target."
            )
        target = first.parameters if budget.equal != "flops" else first.flops.training
    found = []
    for entry in spec.methods:
        check_method(entry.name, comparison.recipe.evaluate)
        method = describe(entry.name)
        settings = _settings(comparison, entry)
        is_reference = budget.target is None and entry.label == (budget.of or spec.reference())
        fixed = budget.equal == "nothing" or method.shapes is None or rank_key(method) in settings or is_reference
        if fixed:
            found.append(_as_given(comparison, entry, model_config))
            continue
        assert target is not None
        equal: Literal["parameters", "flops"] = "flops" if budget.equal == "flops" else "parameters"
        widths = adapted_widths(model_config, settings, trust_remote_code=remote, by_peft=_is_peft_s(entry))
        solved = solve_rank(
            entry.name, settings | _tasks(entry, comparison), widths, target, equal=equal, scale=entry.scale
        )
        found.append(
            Competitor(
                label=entry.label,
                name=entry.name,
                settings=with_rank(entry.name, settings, solved.rank, entry.scale),
                train=entry.train,
                parameters=solved.parameters,
                flops=solved.flops,
                rank=solved.rank,
                solved=True,
            )
        )
    for entry, competitor in zip(spec.methods, found, strict=True):
        if METHODS[entry.name].module is not None:
            known = {**competitor.settings, **_tasks(entry, comparison)}
            if differ_by_block(build_config(entry.name, known)):  # only the model knows how many blocks it has
                count_on_meta(model_config, entry.name, known, trust_remote_code=remote)
    return found


def _as_given(comparison: Comparison, entry: Entry, model_config: Any) -> Competitor:
    """A method with its own rank, or the default one."""
    method, settings = describe(entry.name), _settings(comparison, entry)
    remote = comparison.recipe.model.trust_remote_code
    rank = None
    if method.shapes is not None:
        key = rank_key(method)
        rank = settings.get(key, getattr(build_config(entry.name, {}), key))
        settings = with_rank(entry.name, settings, rank, entry.scale)
    elif entry.scale is not None:
        raise ConfigError(f"compare.methods: {entry.label} has a scale, but {entry.name} has no alpha; remove it.")
    known = settings | _tasks(entry, comparison)
    if method.shapes is None:
        parameters, flops = count_on_meta(model_config, entry.name, known, trust_remote_code=remote), None
    else:
        widths = adapted_widths(model_config, settings, trust_remote_code=remote, by_peft=_is_peft_s(entry))
        config = build_config(entry.name, known)
        parameters, flops = count_parameters(method, config, widths), count_flops(method, config, widths)
    return Competitor(
        label=entry.label,
        name=entry.name,
        settings=settings,
        train=entry.train,
        parameters=parameters,
        flops=flops,
        rank=rank,
        solved=False,
    )


def _is_peft_s(entry: Entry) -> bool:
    return METHODS[entry.name].module is None


def _settings(comparison: Comparison, entry: Entry) -> dict[str, Any]:
    """The method's own settings, and those shared by all that it has, too."""
    known = settings_of(entry.name)
    shared = {key: value for key, value in comparison.compare.shared.items() if key in known}
    settings = shared | entry.settings
    if settings.get("target_parameters"):
        raise ConfigError(
            f"compare: {entry.label} has target_parameters, and what a method costs is counted on linear layers alone, "
            "so experts would not be in the budget. Leave it out, here and in compare.shared."
        )
    return settings


def _tasks(entry: Entry, comparison: Comparison) -> dict[str, Any]:
    """What methods of ours are told of the tasks; some have tensors for each."""
    if METHODS[entry.name].module is None:
        return {}
    names = [task.name for task in comparison.recipe.tasks]
    return {"num_tasks": len(names), "task_names": names}


def base_cell(comparison: Comparison) -> Cell:
    """The untrained model, scored as all others are."""
    return _cell("base", BASE, 0, comparison.recipe)


def seed_cell(comparison: Comparison, competitor: Competitor, seed: int, learning_rate: float | None = None) -> Cell:
    """One training of a method with one of the comparison's seeds, scored on the split the recipe asks for."""
    return _cell("seed", competitor.label, seed, _recipe(comparison, competitor, seed, learning_rate))


def trial_cell(comparison: Comparison, competitor: Competitor, seed: int, learning_rate: float) -> Cell:
    """One training of the search for a learning rate, scored on the validation split.

    A trial of full length is the training of `seed_cell` with that seed and rate: it lies in the same folder, so that
    whichever comes second only scores it.
    """
    search = comparison.compare.learning_rate
    assert search is not None
    recipe = _recipe(comparison, competitor, seed, learning_rate, max_steps=search.max_steps)
    return _trial("seed", competitor.label, seed, recipe, in_full=search.max_steps is None)


def clock_cell(comparison: Comparison, competitor: Competitor, number: int, steps: int) -> Cell:
    """A short training whose steps are timed; what comes of it is of no interest."""
    recipe = _recipe(comparison, competitor, comparison.compare.seeds[0], None, max_steps=steps)
    nothing = dict.fromkeys(("during", "every", "keep_best", "early_stopping_patience"))
    unscored: dict[str, Any] = {"limit": 1, "extra_tasks": (), "harness_tasks": (), **nothing}
    changed = {
        "train": recipe.train.model_copy(update={"log_every": 1, "save_every": None, "report_to": ()}),
        "evaluate": recipe.evaluate.model_copy(update=unscored),
    }
    return _cell("clock", competitor.label, number, recipe.model_copy(update=changed))


def single_cell(
    comparison: Comparison,
    competitor: Competitor,
    task: TaskSpec,
    seed: int,
    learning_rate: float | None,
    steps: int,
    *,
    label: str,
) -> Cell:
    """One training of a LoRA on one of the tasks, scored on that task, or on all where transfer is asked for."""
    return _cell("single", label, seed, _single(comparison, competitor, task, seed, learning_rate, steps))


def single_trial_cell(
    comparison: Comparison,
    competitor: Competitor,
    task: TaskSpec,
    seed: int,
    learning_rate: float,
    steps: int,
    *,
    label: str,
) -> Cell:
    """One training of the search for the learning rate of such LoRAs; see `trial_cell`."""
    search = comparison.compare.learning_rate
    assert search is not None
    recipe = _single(comparison, competitor, task, seed, learning_rate, steps)
    return _trial("single", label, seed, recipe, in_full=search.max_steps is None)


def _trial(kind: Kind, label: str, seed: int, recipe: Recipe, *, in_full: bool) -> Cell:
    """Score a training on the validation split; one of full length lies where the cell of the kind looks for it."""
    unseen: dict[str, Any] = {"split": "validation", "extra_tasks": (), "harness_tasks": (), "during": None}
    scored = recipe.evaluate.model_copy(update=unseen)
    cell = _cell("trial", label, seed, recipe.model_copy(update={"evaluate": scored}))
    if not in_full:
        return cell
    whole = _cell(kind, label, seed, recipe)
    shared = cell.recipe.model_copy(update={"output": whole.recipe.output})
    # scores during training are of the test rows, so then the run must be trained as a seed is
    return replace(cell, recipe=shared, training=whole.recipe if whole.recipe.evaluate.during else shared)


def _single(
    comparison: Comparison,
    competitor: Competitor,
    task: TaskSpec,
    seed: int,
    learning_rate: float | None,
    steps: int,
) -> Recipe:
    recipe = _recipe(comparison, competitor, seed, learning_rate, max_steps=steps)
    others = tuple(other for other in recipe.tasks if other.name != task.name) if comparison.compare.transfer else ()
    scored = recipe.evaluate.model_copy(update={"extra_tasks": others, "harness_tasks": ()})
    return recipe.model_copy(update={"tasks": (task,), "evaluate": scored})


def _cell(kind: Kind, label: str, number: int, recipe: Recipe) -> Cell:
    """A cell with a folder of its own under the comparison's ``runs``."""
    unscored = recipe.evaluate.model_copy(update={"before": False})  # the base model has a cell of its own
    recipe = recipe.model_copy(update={"evaluate": unscored})
    # paths relative to the comparison: moved as a whole, it stays finished
    digest = hashlib.sha256(recipe.to_yaml(recipe.output).encode()).hexdigest()[:10]
    name = f"{label}-{kind}{number}-{digest}"
    placed = recipe.model_copy(update={"output": recipe.output / "runs" / name})
    return Cell(name=name, kind=kind, label=label, number=number, recipe=placed, training=placed)


def _recipe(
    comparison: Comparison,
    competitor: Competitor,
    seed: int,
    learning_rate: float | None,
    max_steps: int | None = None,
) -> Recipe:
    usual = {"learning_rate": METHODS[competitor.name].learning_rate}
    own = {**usual, **comparison.recipe.train.model_dump(exclude_unset=True), **competitor.train}
    if learning_rate is not None:
        own["learning_rate"] = learning_rate
    if max_steps is not None:
        own["max_steps"] = max_steps
    method = MethodSpec.model_validate({"name": competitor.name, "settings": dict(competitor.settings)})
    changed: dict[str, Any] = {"method": method, "seed": seed, "train": TrainSpec.model_validate(own)}
    return comparison.recipe.model_copy(update=changed)
