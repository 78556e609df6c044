"""What a comparison is, in YAML: a recipe with a section ``compare`` that names methods, seeds and a budget.

Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from multiflora.errors import ConfigError
from multiflora.methods import METHODS
from multiflora.recipe import Recipe, override, recipe_from
from multiflora.schema import Strict, build
from multiflora.suggest import did_you_mean
from multiflora.tasks.spec import TaskSpec
from multiflora.yaml_file import dump_yaml, parse_yaml, read_yaml

__all__ = [
    "COMPARISON",
    "SUMMARY",
    "BudgetSpec",
    "CompareSpec",
    "Comparison",
    "Entry",
    "Published",
    "SearchSpec",
    "command_of",
    "load_comparison",
]

COMPARISON, SUMMARY = "comparison.yaml", "summary.json"
"""Files of a comparison: what it is, and, once it is finished, what it found."""


class Entry(Strict):
    """One competitor: a method with its settings."""

    name: str
    """The method, as ``multiflora methods`` lists it."""
    label: str = Field(default="", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")
    """Name in tables and files; the method's own where nothing else is given. Labels must differ."""
    scale: float | None = Field(default=None, gt=0)
    """alpha/r (alpha/√r with ``use_rslora``), kept whatever the rank; None: that of the method's defaults."""
    train: dict[str, Any] = Field(default={})
    """What this method needs otherwise in ``train``, e.g. ``{learning_rate: 1e-3}``."""
    settings: dict[str, Any] = Field(default={})
    """The method's settings, written beside the name. A method that is given its rank here keeps it."""

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        """Read ``lora``, ``{name: lora, r: 8}`` and ``{lora: {r: 8}}`` alike."""
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping):
            return value
        if "name" not in value and len(value) == 1:
            name, inner = next(iter(value.items()))
            value = {"name": name, **(inner or {})}
        own = {"name", "label", "scale", "train", "settings"}
        flat = {key: item for key, item in value.items() if key not in own}
        kept = {key: item for key, item in value.items() if key in own}
        return {"label": value.get("name", ""), **kept, "settings": {**(value.get("settings") or {}), **flat}}

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in METHODS:
            raise ValueError(f"{value!r} is not a method; {did_you_mean(value, METHODS)}")
        return value


class BudgetSpec(Strict):
    """What is equal among the methods."""

    equal: Literal["parameters", "flops", "time", "nothing"] = "parameters"
    """Trainable parameters, operations of a training token, training time (with equal parameters), or nothing."""
    of: str | None = None
    """Label of the method that sets the budget by its own settings; None: the baseline."""
    target: int | None = Field(default=None, gt=0)
    """The budget as a number, instead of ``of``: parameters, or operations that an adapter adds to a training token."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """Read ``flops`` and ``{equal: flops}`` alike."""
        return {"equal": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_source(self) -> BudgetSpec:
        if self.of is not None and self.target is not None:
            raise ValueError(f"both of ({self.of}) and target ({self.target}) set the budget; keep one.")
        if self.equal == "time" and self.target is not None:
            raise ValueError(
                "target is set, but equal is 'time', which is measured; name the method that sets the time as 'of'."
            )
        return self


class SearchSpec(Strict):
    """A search for the learning rate: one grid and the same number of trainings for all methods.

    The grid is even on a logarithmic scale and holds the recipe's own rate and each method's usual one. While the best
    rate of a method lies on an edge, the grid grows there. The best is chosen on the validation rows by the macro
    score, and by the loss where scores are within one standard error.
    """

    trials: int = Field(default=5, gt=0)
    """Rates of the first grid; at least three, and more where the rates that must be in it lie far apart."""
    factor: float = Field(default=3.0, gt=1)
    """Largest ratio of neighbouring rates."""
    grow: int = Field(default=6, ge=0)
    """Most rates by which the grid grows, for all methods alike."""
    low: float | None = Field(default=None, gt=0)
    """A rate that the first grid must reach down to; None: as ``trials`` and the rates that must be in it say."""
    high: float | None = Field(default=None, gt=0)
    """A rate that it must reach up to."""
    seeds: int = Field(default=1, gt=0)
    """Trainings with each rate: with the first so many of the comparison's seeds."""
    max_steps: int | None = Field(default=None, gt=0)
    """Optimiser steps of a trial; None: as many as a training has, and then the trial at the best rate is one."""

    @model_validator(mode="before")
    @classmethod
    def _seed_is_gone(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "seed" in value:
            raise ValueError(
                "seed is no longer a key: trials are trained with the comparison's own seeds, so that the one at the "
                "best rate is not trained again. Remove it; 'seeds: 2' tries every rate with the first two of them."
            )
        return value

    @model_validator(mode="after")
    def _in_order(self) -> SearchSpec:
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"low is {self.low} and high is {self.high}; low must be the smaller one.")
        return self


class Published(Strict):
    """A table of a paper, to stand beside the own one."""

    title: str
    """What it shows: model, tasks, measure."""
    source: str
    """Paper and table."""
    columns: tuple[str, ...]
    """Names of the numbers."""
    rows: dict[str, tuple[float | None, ...]]
    """Method -> its numbers, as printed."""

    @model_validator(mode="after")
    def _full(self) -> Published:
        for method, numbers in self.rows.items():
            if len(numbers) != len(self.columns):
                raise ValueError(f"rows.{method} has {len(numbers)} numbers for {len(self.columns)} columns.")
        return self


class CompareSpec(Strict):
    """The section ``compare`` of a recipe."""

    methods: tuple[Entry, ...] = Field(min_length=1)
    """The competitors."""
    shared: dict[str, Any] = Field(default={})
    """Settings of every method that has them, e.g. ``{target_modules: [up_proj, down_proj], lora_dropout: 0.05}``."""
    baseline: str | None = None
    """Label of the method that the others are tested against; None: ``lora`` if it is there, else the first."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the trainings, or how many; every method gets the same ones."""
    max_seeds: int | None = Field(default=None, gt=0)
    """The most seeds that may be added while the comparison is undecided; None: no more than ``seeds``, or 10 with
    ``until: decided``. It is part of the plan: what a look at the numbers may claim depends on it."""
    until: Literal["decided"] | None = None
    """``decided``: add seeds until every method has a verdict, or ``max_seeds`` or ``max_hours`` is reached."""
    max_hours: float | None = Field(default=None, gt=0)
    """With ``until: decided``, start no further seeds after so many hours."""
    margin: float | None = Field(default=None, gt=0, le=100)
    """A loss of macro score, in points of 100, that does not matter to you: a method can be shown to lose no more."""
    budget: BudgetSpec = BudgetSpec()
    """What is equal among the methods."""
    learning_rate: SearchSpec | None = None
    """Search each method's learning rate; None: ``train.learning_rate`` for all, or each method's usual one; then
    no method is called better than another."""
    single_task: bool = False
    """Train one LoRA per task, too, of the whole budget each and of a share of it: does training together pay?
    Tuned as the methods are, where ``learning_rate`` is searched."""
    transfer: bool = False
    """Score each single task's LoRA on all tasks: the matrix of what transfers. Needs ``single_task``."""
    devices: int | None = Field(default=None, gt=0)
    """Trainings at a time, one on each device; None: one for each GPU, or one (on a cluster: as many as it takes)."""
    executor: Literal["local", "slurm", "ray"] = "local"
    """Where trainings run: here, as Slurm jobs (through submitit), or on a Ray cluster; all share the output folder."""
    resources: dict[str, Any] = Field(default={})
    """What a training asks the cluster for, in submitit's or Ray's words: ``{timeout_min: 240, gpus_per_node: 1}``."""
    about: str = ""
    """What the comparison is for."""
    stated: tuple[str, ...] = ()
    """For a paper's set-up: what the paper states and this file follows."""
    chosen: tuple[str, ...] = ()
    """For a paper's set-up: what the paper leaves open, and what was chosen here."""
    published: tuple[Published, ...] = ()
    """The paper's own tables."""

    @field_validator("seeds", mode="before")
    @classmethod
    def _number_of_seeds(cls, value: Any) -> Any:
        return tuple(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) < len(value) or min(value) < 0:
            raise ValueError(f"seeds are {list(value)}; expected at least one, all different and none negative.")
        return value

    @model_validator(mode="after")
    def _looks_fit(self) -> CompareSpec:
        if self.max_seeds is not None and self.max_seeds < len(self.seeds):
            raise ValueError(
                f"max_seeds is {self.max_seeds}, but seeds has {len(self.seeds)} already; raise one or lower the other."
            )
        if self.max_hours is not None and self.until is None:
            raise ValueError("max_hours is set, but nothing reads it without 'until: decided'; set that or remove it.")
        return self

    @model_validator(mode="after")
    def _resources_are_read(self) -> CompareSpec:
        if self.resources and self.executor == "local":
            raise ValueError("resources is set, but executor is 'local', which ignores it; set executor or remove it.")
        return self

    @model_validator(mode="after")
    def _transfer_of_single_tasks(self) -> CompareSpec:
        if self.transfer and not self.single_task:
            raise ValueError("transfer is true, but single_task is not, whose LoRAs it scores; set both or neither.")
        return self

    @model_validator(mode="after")
    def _seeds_suffice(self) -> CompareSpec:
        if self.learning_rate is not None and self.learning_rate.seeds > len(self.seeds):
            raise ValueError(
                f"learning_rate.seeds is {self.learning_rate.seeds}, but there are {len(self.seeds)} seeds; trials are "
                "trained with the comparison's own. Give more seeds, or a smaller number."
            )
        return self

    @model_validator(mode="after")
    def _labels_fit(self) -> CompareSpec:
        labels = [entry.label for entry in self.methods]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"methods has {twice[0]!r} twice; give one of them a label of its own (label: ...).")
        for key, label in (("baseline", self.baseline), ("budget.of", self.budget.of)):
            if label is not None and label not in labels:
                raise ValueError(f"{key} is {label!r}, which is no label of methods; {did_you_mean(label, labels)}")
        return self

    def looks(self) -> tuple[int, ...]:
        """Numbers of seeds at which the comparison may be looked at, see `multiflora.comparison.looks`."""
        from multiflora.comparison.looks import planned_looks

        most = self.max_seeds or (max(len(self.seeds), 10) if self.until else len(self.seeds))
        return planned_looks(len(self.seeds), most)

    def more_seeds(self, number: int) -> tuple[int, ...]:
        """The seeds, and as many new ones behind them as make the number."""
        found = list(self.seeds)
        while len(found) < number:
            found.append(max(found) + 1)
        return tuple(found)

    def reference(self) -> str:
        """Label of the method that the others are tested against."""
        labels = [entry.label for entry in self.methods]
        return self.baseline or ("lora" if "lora" in labels else labels[0])


class Comparison(Strict):
    """A recipe, and what is varied in it."""

    recipe: Recipe
    """What all cells share; its method, seed and output are set anew in each."""
    compare: CompareSpec
    """What differs."""

    def to_yaml(self, folder: Path | None = None) -> str:
        """Write the resolved comparison as one YAML, see `Recipe.to_yaml`."""
        section = self.compare.model_dump(mode="json", exclude_defaults=True, exclude={"methods"})
        methods = [_plain_entry(entry) for entry in self.compare.methods]
        recipe = parse_yaml(self.recipe.to_yaml(folder), "recipe")
        del recipe["method"]
        if "learning_rate" not in self.recipe.train.model_fields_set:
            del recipe["train"]["learning_rate"]  # each method's own
        return dump_yaml({**recipe, "compare": {"methods": methods, **section}})


def _plain_entry(entry: Entry) -> dict[str, Any]:
    plain = entry.model_dump(mode="json", exclude_defaults=True, exclude={"settings"})
    if plain.get("label") == entry.name:
        del plain["label"]
    return plain | entry.settings


def load_comparison(source: Comparison | Mapping[str, Any] | str | Path, overrides: Sequence[str] = ()) -> Comparison:
    """Read a comparison.

    Args:
        source: A comparison, a mapping with a recipe's keys and ``compare``, or the path of a YAML file.
        overrides: ``key.path=value`` items, as for a recipe: ``compare.seeds=5``, ``train.max_steps=100``.

    Raises:
        ConfigError: The file is missing or not YAML, or it has problems: all of them are listed.
    """
    if isinstance(source, Comparison):
        return source
    where, base, plain = "comparison", Path.cwd(), source
    if isinstance(source, str | Path):
        where, base, plain = str(source), Path(source).absolute().parent, read_yaml(Path(source))
    if not isinstance(plain, Mapping) or not isinstance(plain.get("compare"), Mapping):
        raise ConfigError(
            f"{where} has no section 'compare'; expected a recipe with one more key, "
            "e.g. compare: {methods: [lora, rlora], seeds: 3}."
        )
    for item in overrides:
        plain = override(plain, item)
    spec = build(CompareSpec, plain["compare"], where=f"{where}, compare", base=base)
    rest = {key: value for key, value in plain.items() if key != "compare"}
    if "method" in rest:
        raise ConfigError(f"{where} has both 'method' and 'compare'; the methods of a comparison are compare.methods.")
    # a recipe has one method; in a comparison it stands for none
    recipe = recipe_from({**rest, "method": spec.methods[0].name}, where=where, base=base)
    if recipe.init_from is not None:
        raise ConfigError(
            f"{where}: init_from is {recipe.init_from}, but the methods of a comparison start alike, each from a fresh "
            "adapter. Remove it; `multiflora evaluate RUN RUN` puts runs side by side that were trained one by one."
        )
    if spec.budget.equal == "time" and recipe.train.max_steps is None:
        raise ConfigError(
            f"{where}: compare.budget is time, so the steps of every method follow from those of "
            f"{spec.budget.of or spec.reference()}; set train.max_steps."
        )
    if spec.learning_rate is not None:
        recipe = recipe.model_copy(update={"tasks": tuple(_with_validation(task) for task in recipe.tasks)})
    return Comparison(recipe=recipe, compare=spec)


def _with_validation(task: TaskSpec) -> TaskSpec:
    """The task with validation rows to search on: those of its source, or some cut as other splits are."""
    if "validation" in task.split_sizes:
        return task
    size = TaskSpec.model_fields["split_sizes"].default["validation"]
    return task.model_copy(update={"split_sizes": {"validation": size, **task.split_sizes}})


def command_of(comparison: Comparison) -> str:
    """What goes on with a comparison, to be typed in the current folder, or else in its own.

    Where things lie on a machine is nobody's business, and sentences are shown to others.
    """
    path, here = comparison.recipe.output / COMPARISON, Path.cwd()
    return f"multiflora compare {path.relative_to(here) if path.is_relative_to(here) else COMPARISON}"
