"""Several runs' adapters scored on one load of their base model, which is scored once."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from multiflora.adapter_folder import check_adapter, load_adapter
from multiflora.adapter_tensors import method_of
from multiflora.base_model import share_weights
from multiflora.errors import ConfigError
from multiflora.evaluation.load import load_base
from multiflora.evaluation.results import Results
from multiflora.evaluation.run import evaluate
from multiflora.files import user_path
from multiflora.methods import METHODS
from multiflora.once import kept
from multiflora.recipe import Recipe, load_recipe
from multiflora.suggest import listed
from multiflora.tasks import TaskSpec, load_task
from multiflora.training.precision import weights_of

__all__ = ["SideBySide", "evaluate_side_by_side"]

log = logging.getLogger(__name__)

T = TypeVar("T", TaskSpec, str)


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """Scores of a base model and of several adapters on it."""

    base: Results
    """Of the model without an adapter."""
    adapters: dict[str, Results]
    """Name of the run -> its scores; without tasks that its adapter would route by and was not trained on."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {"base": self.base, "adapters": self.adapters}


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One of the runs."""

    folder: Path
    recipe: Recipe
    config: Any
    """Its adapter's."""

    def knows(self, task: TaskSpec | str) -> bool:
        """Whether the adapter can be scored on a task, or one of the harness: one that routes by task must know it."""
        method = method_of(self.config)
        if method is None or not method.needs_task():
            return True
        return isinstance(task, TaskSpec) and task.name in (self.config.task_names or ())


def evaluate_side_by_side(
    targets: Sequence[str | Path],
    tasks: Sequence[str] | None = None,
    *,
    split: str | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> SideBySide:
    """Score several runs on the same tasks; their base model is loaded once and scored, too.

    Args:
        targets: Output folders of runs with adapters on one base model.
        tasks: Names of tasks of the runs, shipped names, task files or folders of files; None: all tasks of all runs,
            those that are only scored included.
        split: ``test`` or ``validation``; None: as the runs' recipes say.
        limit: At most this many examples of each task, a seeded sample; None: all.
        batch_size: Rows of a forward pass; None: as the first recipe says.
        progress: Show a progress bar on stderr.

    Raises:
        ConfigError: One of them is no run with an adapter, or their base models, their tasks of one name or their ways
            of scoring differ.
        MultifloraError: See `multiflora.evaluation.run.evaluate`.

    Example:
        >>> evaluate_side_by_side(["runs/lora", "runs/rlora"]).adapters["rlora"]["macro"]  # doctest: +SKIP
        0.74
    """
    runs = _named([_run(target) for target in targets])
    if not runs:
        raise ConfigError("There are no runs to score; expected some output folders of `multiflora train`.")
    first = next(iter(runs.values())).recipe
    _check_alike(runs, split)
    mine, extra, harness = _tasks(runs, tasks)
    for name, run in runs.items():
        if not any(run.knows(task) for task in [*mine, *extra]) and not any(run.knows(task) for task in harness):
            raise ConfigError(
                f"The adapter of {name} routes by task and was trained on none of those to score. It knows "
                f"{listed(run.config.task_names or (), 10)}; name one of these with --tasks, or leave {name} out."
            )
    base, tokenizer = load_base(first.model, weights_of(first))

    def score(model: Any, run: _Run | None = None) -> Results:
        def known(names: Iterable[T]) -> list[T]:
            return [name for name in names if run is None or run.knows(name)]

        return evaluate(
            model,
            tokenizer,
            known(mine),
            extra_tasks=known(extra),
            harness_tasks=known(harness),
            split=split or first.evaluate.split,
            limit=limit,
            batch_size=batch_size or first.evaluate.batch_size,
            max_new_tokens=first.evaluate.max_new_tokens,
            chat_template=first.model.chat_template,
            progress=progress,
        )

    with kept():  # tasks are read once
        log.info("Scoring the base model, %s", first.model.name)
        before, found = score(base), {}
        for name, run in runs.items():
            log.info("Scoring %s", name)
            found[name] = score(load_adapter(_tree(base, run.config), run.folder), run)
            if len(found[name]["tasks"]) < len(before["tasks"]):
                others = listed([task for task in before["tasks"] if task not in found[name]["tasks"]], 10)
                log.warning("%s routes by task and was not trained on %s; it is not scored on them", name, others)
                # a mean over fewer tasks than the others' would stand beside theirs as if it were the same
                found[name] = Results(tasks=found[name]["tasks"], macro=None, macro_stderr=None)
    return SideBySide(base=before, adapters=found)


def _run(target: str | Path) -> _Run:
    """Read a run's recipe and its adapter's config."""
    folder = user_path(target)
    if not (folder / "recipe.yaml").is_file():
        raise ConfigError(
            f"{target} is no run's output folder (it has no recipe.yaml); what is scored side by side are runs with "
            "adapters on one base model. Score it by itself, or leave it out."
        )
    recipe = load_recipe(folder / "recipe.yaml")
    if METHODS[recipe.method.name].trains in ("weights", "factors"):
        raise ConfigError(
            f"{target} holds a whole model (method {recipe.method.name}), and no adapter on the base model that the "
            "runs share. Score it by itself."
        )
    return _Run(folder=folder, recipe=recipe, config=check_adapter(folder))


def _named(runs: Sequence[_Run]) -> dict[str, _Run]:
    """Name the runs after their folders, or by their whole paths where two folders have one name."""
    places = [run.folder.resolve() for run in runs]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice} is named twice; name each run once.")
    names = [place.name for place in places]
    return {
        place.name if names.count(place.name) == 1 else str(run.folder): run
        for place, run in zip(places, runs, strict=True)
    }


def _check_alike(runs: Mapping[str, _Run], split: str | None) -> None:
    """Refuse runs whose scores would not stand for the same thing."""

    def one(what: str, values: Mapping[str, Any], mend: str) -> None:
        (name, value), *others = values.items()
        for other, its in others:
            if its != value:
                raise ConfigError(
                    f"The {what} of {other} is {its} and that of {name} is {value}; side by side they must be the "
                    f"same. {mend}"
                )

    alone = "Score them one by one."
    each = {name: run.recipe for name, run in runs.items()}
    one("base model", {name: recipe.model.name for name, recipe in each.items()}, alone)
    one("model.revision", {name: recipe.model.revision for name, recipe in each.items()}, alone)
    one("type of the base weights", {name: weights_of(recipe) for name, recipe in each.items()}, alone)
    one("model.chat_template", {name: recipe.model.chat_template for name, recipe in each.items()}, alone)
    one("evaluate.max_new_tokens", {name: recipe.evaluate.max_new_tokens for name, recipe in each.items()}, alone)
    if split is None:
        splits = {name: recipe.evaluate.split for name, recipe in each.items()}
        one("evaluate.split", splits, "Choose one with --split.")


def _tasks(
    runs: Mapping[str, _Run], wanted: Sequence[str] | None
) -> tuple[list[TaskSpec], list[TaskSpec], tuple[str, ...]]:
    """What is scored: tasks that some run was trained on, or that were asked for; others; those of the harness."""
    trained, extra, owner = dict[str, TaskSpec](), dict[str, TaskSpec](), dict[str, str]()
    for name, run in runs.items():
        for group, tasks in ((trained, run.recipe.tasks), (extra, run.recipe.evaluate.extra_tasks)):
            for task in tasks:
                before = trained.get(task.name) or extra.get(task.name)
                if before is not None and _scored(before) != _scored(task):
                    raise ConfigError(
                        f"Task {task.name} is not the same in {name} as in {owner[task.name]}; side by side it must be."
                        " Give one of them another name, or score the runs one by one."
                    )
                owner.setdefault(task.name, name)
                group.setdefault(task.name, task)
    if wanted is not None:
        known = extra | trained
        return [known.get(task) or load_task(task) for task in wanted], [], ()
    harness = dict.fromkeys(name for run in runs.values() for name in run.recipe.evaluate.harness_tasks)
    return list(trained.values()), [task for name, task in extra.items() if name not in trained], tuple(harness)


def _scored(task: TaskSpec) -> TaskSpec:
    """A task without what only its training reads."""
    return task.model_copy(update={"weight": 1.0})


def _tree(base: Any, config: Any) -> Any:
    """A model to put an adapter on, with the base's own weights but where the adapter brings biases to write there."""
    return share_weights(base) if getattr(config, "bias", "none") == "none" else copy.deepcopy(base)
