"""TaskSpec: where a task's examples come from, how a row becomes text, and how an answer is scored."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from multiflora.schema import Strict, absolute
from multiflora.tasks.jinja import check_expression, check_template

__all__ = [
    "SPLITS",
    "FilesSource",
    "GeneratorSource",
    "HubSource",
    "MessageSpec",
    "Score",
    "Source",
    "Split",
    "TaskSpec",
]

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Score = Literal["choices", "exact", "number", "rouge", "verifier", "nll"]


MOST_ROWS = 1_000_000
"""Rows that a generator makes for one split: they are made one by one, and held in memory."""

LARGEST = 10_000
"""Largest number in a generator's settings, but for those that bound a value: the rest are counts and lengths."""

# what `load_dataset` takes for the name of a reader, besides hub ids and folders
_READERS = frozenset(("pandas", "sql", "spark", "generator", "webdataset", "cache", "arrow"))


class HubSource(Strict):
    """A data set on the Hugging Face hub, in the words of ``datasets.load_dataset``."""

    kind: ClassVar[str] = "hub"

    path: str = Field(min_length=1)
    """Hub id of the data set, e.g. ``openai/gsm8k``; a local folder in the hub's layout works too."""
    name: tuple[str, ...] = ()
    """Configurations to read, one after the other; empty for the only or default one."""
    splits: dict[Split, str] = Field(default={"train": "train"})
    """Our split -> the hub's split expression, e.g. ``{train: train, test: validation}``; missing ones are cut."""
    data_files: dict[str, tuple[str, ...]] = Field(default={})
    """Files to read within the repository, hub split -> paths or globs; empty for what the repository declares."""
    revision: str | None = None
    """Commit, tag or branch; None is the newest."""

    @field_validator("path")
    @classmethod
    def _folder(cls, value: str, info: ValidationInfo) -> str:
        if value in _READERS:
            raise ValueError(
                f"{value!r} is a reader of `datasets` and no data set; some of them read pickles, which can carry "
                "code. Name files with 'train:', 'validation:' and 'test:'."
            )
        path = absolute(value, info)
        return str(path) if value.startswith((".", "~", "/")) or os.path.isdir(path) else value

    @field_validator("name", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return () if value is None else (value,) if isinstance(value, str) else value

    @field_validator("data_files", mode="before")
    @classmethod
    def _one_file(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: (v,) if isinstance(v, str) else v for k, v in value.items()}
        return value


class FilesSource(Strict):
    """JSONL, JSON, CSV, TSV or Parquet files, told apart by their suffix. Paths are relative to the recipe file."""

    kind: ClassVar[str] = "files"

    folder: Path | None = None
    """Folder with ``train``, ``validation`` and ``test`` files of any of those suffixes; missing splits are cut."""
    train: tuple[Path, ...] = ()
    """Files or globs of the training split."""
    validation: tuple[Path, ...] = ()
    """Files or globs of the validation split."""
    test: tuple[Path, ...] = ()
    """Files or globs of the test split."""

    @field_validator("train", "validation", "test", mode="before")
    @classmethod
    def _absolute_files(cls, value: Any, info: ValidationInfo) -> Any:
        paths = (value,) if isinstance(value, str | Path) else value
        if isinstance(paths, list | tuple) and all(isinstance(p, str | Path) for p in paths):
            return tuple(absolute(p, info) for p in paths)
        return paths

    @field_validator("folder", mode="before")
    @classmethod
    def _absolute_folder(cls, value: Any, info: ValidationInfo) -> Any:
        return absolute(value, info) if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _names_something(self) -> FilesSource:
        given = bool(self.train or self.validation or self.test)
        if given == (self.folder is not None):
            raise ValueError(
                "a source of files names either 'folder' or some of 'train', 'validation', 'test'; "
                "a hub data set has 'path', a reasoning-gym task has 'generator'."
            )
        return self


class GeneratorSource(Strict):
    """A seeded reasoning-gym generator, which makes as many rows as asked for and can verify answers."""

    kind: ClassVar[str] = "generator"

    generator: str = Field(min_length=1)
    """Name of the generator in reasoning-gym, e.g. ``letter_counting``."""
    seed: int = Field(default=0, ge=0)
    """Seed of the rows."""
    sizes: dict[Split, int] = Field(default={"train": 2000, "validation": 100, "test": 200})
    """Rows of each split; the splits never share a row."""
    settings: dict[str, Any] = Field(default={})
    """The generator's own settings, e.g. ``{max_words: 5}``."""

    @field_validator("settings")
    @classmethod
    def _within_reason(cls, value: dict[str, Any]) -> dict[str, Any]:
        """A grid of a billion rows would be made before anybody could stop it."""
        for key, setting in value.items():
            sizes = setting if isinstance(setting, list | tuple) else [setting]
            if "value" not in key and any(isinstance(size, int | float) and abs(size) > LARGEST for size in sizes):
                raise ValueError(
                    f"{key} is {str(setting)[:40]}; a row of that size is not made. Give {LARGEST:,} or less."
                )
        return value

    @field_validator("sizes")
    @classmethod
    def _not_negative(cls, value: dict[Split, int]) -> dict[Split, int]:
        for split, rows in value.items():
            if not 0 <= rows <= MOST_ROWS:
                raise ValueError(f"{split} is {rows} rows; expected 0 to {MOST_ROWS:,}.")
        return value


def _source_kind(value: Any) -> str:
    if isinstance(value, HubSource | FilesSource | GeneratorSource):
        return value.kind
    keys = set(value) if isinstance(value, Mapping) else set()
    return "generator" if "generator" in keys else "hub" if "path" in keys else "files"


def _from_path(value: Any) -> Any:
    """A bare path is a folder of splits, or one file to cut the splits from."""
    if isinstance(value, str | Path):
        return (
            {"train": value}
            if Path(value).suffix in {".jsonl", ".json", ".csv", ".tsv", ".parquet"}
            else {"folder": value}
        )
    return value


Source = Annotated[
    Annotated[HubSource, Tag("hub")]
    | Annotated[FilesSource, Tag("files")]
    | Annotated[GeneratorSource, Tag("generator")],
    Discriminator(_source_kind),
    BeforeValidator(_from_path),
]


class MessageSpec(Strict):
    """One turn of a conversation, as templates."""

    role: str
    """Who speaks: system, developer, user, assistant or tool."""
    content: str
    """Jinja template of what is said."""

    @field_validator("content")
    @classmethod
    def _compiles(cls, value: str) -> str:
        return check_template(value)


class TaskSpec(Strict):
    """One task. Templates see a row's columns as variables, and the whole row as ``row``."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)
    """Name in logs, tables and files: letters, digits, ``_``, ``-`` and ``.``, up to 100 of them."""
    about: str = ""
    """One line on what the task asks."""
    licence: str = ""
    """Licence of the data, repeated in the model card."""
    source: Source
    """Where rows come from: a hub data set, files, or a reasoning-gym generator."""
    keep: str | None = None
    """Jinja condition; rows where it is false are left out, e.g. ``label >= 0`` for unlabelled rows."""
    prompt: str | None = None
    """Jinja template of what the model reads."""
    completion: str | None = None
    """Jinja template of what it should write, with its leading space; None: the right choice, or the last message."""
    rejected: str | None = None
    """Jinja template of a worse completion, which ``train.objective: dpo`` prefers the completion to; None: none."""
    messages: str | tuple[MessageSpec, ...] | None = None
    """Instead of ``prompt``: a conversation, as a list of role and content templates or an expression giving one."""
    choices: str | tuple[str, ...] | None = None
    """All candidate completions: a list of templates, or a Jinja expression that gives a list."""
    answer: str | None = None
    """Jinja expression: index, text or label of the right choice; without choices, the reference answer."""
    labels: str | tuple[str, ...] | None = None
    """Names of the choices that ``answer`` may use, e.g. ``[A, B, C, D]``, or a Jinja expression that gives them."""
    tools: str | None = None
    """Jinja expression: the tools that the assistant of a conversation may call, for the model's chat template."""
    train_on: Literal["last", "all"] = "last"
    """Which of a conversation's turns of the assistant carry loss; one of ``weight: 0`` never does."""
    id: str | None = None
    """Jinja expression of a row's name; None: task, split and row number."""
    score: Score
    """How it is scored: choices by log-likelihood, exact match, number, rouge, verifier, or nll (nats per token)."""
    length_normalised: bool = False
    """Divide each choice's log-likelihood by its length in bytes before comparing."""
    stop: tuple[str, ...] = ()
    """Generated text ends before the first of these."""
    max_new_tokens: int | None = Field(default=None, gt=0)
    """Longest generated answer, in tokens; None: the recipe's ``evaluate.max_new_tokens``."""
    few_shot: int = Field(default=0, ge=0, le=1000)
    """Examples of the training split, with their answers, before each scored one: drawn by its name, never itself."""
    weight: float = Field(default=1.0, gt=0)
    """Share in the mixture relative to the other tasks (used by ``mixture.strategy: weights``)."""
    split_from: Split = "train"
    """The split that missing ones are cut from, seeded and disjoint."""
    split_sizes: dict[Split, Annotated[int | float, Field(gt=0)]] = Field(default={"validation": 0.1, "test": 0.1})
    """Size of a split that must be cut: a fraction of the rows below 1, else a number of rows."""
    split_seed: int = 0
    """Seed of the cut, and of the sample when fewer rows are asked for."""
    group: str | None = None
    """Jinja expression, e.g. a column; rows that share its value never land in two splits."""

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, value: Any) -> Any:
        """Make explicit what follows from the other keys, so that a written recipe says everything."""
        if not isinstance(value, Mapping):
            return value
        task = dict(value)
        generated = _source_kind(task.get("source")) == "generator"
        if task.get("prompt") is None and task.get("messages") is None:
            task["prompt"] = "{{ question }}\nAnswer:" if generated else "{{ prompt }}"
            if task.get("completion") is None and task.get("choices") is None:
                task["completion"] = " {{ answer }}" if generated else "{{ completion }}"
        if task.get("choices") is not None and task.get("answer") is None:
            task["answer"] = "answer"
        if task.get("score") is None:
            has_choices, has_answer = task.get("choices") is not None, task.get("answer") is not None
            task["score"] = "choices" if has_choices else "verifier" if generated else "exact" if has_answer else "nll"
        if task.get("stop") is None:
            task["stop"] = {"exact": ("\n",), "verifier": ("\n",), "number": ("\n\n",)}.get(task["score"], ())
        return task

    @field_validator("prompt", "completion", "rejected")
    @classmethod
    def _template(cls, value: str | None) -> str | None:
        return value if value is None else check_template(value)

    @field_validator("keep", "answer", "id", "group", "tools")
    @classmethod
    def _expression(cls, value: str | None) -> str | None:
        return value if value is None else check_expression(value)

    @field_validator("labels")
    @classmethod
    def _labels_or_expression(cls, value: Any) -> Any:
        return check_expression(value) if isinstance(value, str) else value

    @field_validator("choices", "messages")
    @classmethod
    def _templates_or_expression(cls, value: Any) -> Any:
        if isinstance(value, str):
            return check_expression(value)
        for item in value or ():
            if isinstance(item, str):
                check_template(item)
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits_together(self) -> TaskSpec:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either 'prompt' or 'messages', not both.")
        if (self.score == "choices") != (self.choices is not None):
            raise ValueError(
                f"score is {self.score!r} and choices is {self.choices!r}; "
                "'choices' needs the list of candidate completions, and the other scores have none."
            )
        if self.score == "verifier" and not isinstance(self.source, GeneratorSource):
            raise ValueError("score 'verifier' needs a reasoning-gym source; use exact, number, rouge or nll.")
        if self.score == "verifier" and self.id is not None:
            raise ValueError("'id' is for rows that have one: a generator's rows are verified by their number.")
        if self.prompt is not None and self.completion is None and self.choices is None:
            raise ValueError("'completion' is missing: the template of what the model should write after the prompt.")
        return self
