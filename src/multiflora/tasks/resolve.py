"""From what a recipe says of a task (a name, a path, a mapping) to a full TaskSpec."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multiflora.errors import ConfigError, DataError
from multiflora.files import expanded
from multiflora.schema import Strict, build
from multiflora.suggest import did_you_mean, listed, shown
from multiflora.tasks.files import SUFFIXES, split_files
from multiflora.tasks.kind import Facts, facts_of, is_conversation
from multiflora.tasks.shipped import shipped_tasks
from multiflora.tasks.spec import FilesSource, Source, TaskSpec
from multiflora.yaml_file import read_yaml

__all__ = ["expand_task", "load_task"]


def load_task(task: str | Path | Mapping[str, Any] | TaskSpec, base: Path | None = None) -> TaskSpec:
    """Resolve one task.

    Args:
        task: A shipped task's name; the path of a task file (``.yaml``), of a folder with ``train.jsonl`` and so on, or
            of one data file; a mapping of TaskSpec's keys, where naming a shipped task and no source changes that one.
        base: Folder that relative paths are relative to; None is the current one.

    Raises:
        ConfigError: No such task, or problems in it (all of them).
        DataError: A file that must be looked at does not exist or is malformed.

    Example:
        >>> load_task({"name": "gsm8k", "weight": 2}).weight
        2.0
    """
    base = Path.cwd() if base is None else Path(base)
    value = expand_task(task, base)
    if isinstance(value, TaskSpec):
        return value
    where = f"task {value['name']}" if isinstance(value, Mapping) and "name" in value else "task"
    return build(TaskSpec, value, where=where, base=base)


def expand_task(task: Any, base: Path) -> Any:
    """Return the mapping (or TaskSpec) that a short spelling stands for; what is not one is returned as it is."""
    if isinstance(task, str | Path):
        return _from_word(str(task), base)
    if not isinstance(task, Mapping):
        return task
    if "source" in task:
        return _complete(dict(task), base)
    name, shipped = task.get("name"), shipped_tasks()
    if not isinstance(name, str):
        return task
    if name in shipped or _is_path(name, base):  # a short spelling with some keys changed
        short = _from_word(name, base)
        written = short.model_dump(mode="json", exclude_none=True) if isinstance(short, TaskSpec) else short
        return {**written, **{key: value for key, value in task.items() if key != "name"}}
    if not set(task) - {"weight", "name"}:  # only a name: it was meant to be a shipped one
        raise ConfigError(_unknown(name, shipped))
    return task


def _from_word(word: str, base: Path) -> Any:
    path = base / expanded(word)
    if path.suffix in {".yaml", ".yml"}:
        value = read_yaml(path)
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} is no mapping; expected the keys of a task: name, source, prompt, ...")
        # paths in a task file are relative to it: resolve here, as the caller's base is another
        return build(
            TaskSpec,
            expand_task({"name": path.stem, **value}, path.parent),
            where=str(path),
            base=path.parent,
        )
    # a folder of the name of a shipped task is written with a dot: ./boolq
    if word not in shipped_tasks() and _is_path(word, base):
        name = path.parent.name if path.stem in {"train", "test", "validation"} else path.stem
        return _complete({"name": name, "source": str(path)}, base)
    shipped = shipped_tasks()
    if word not in shipped:
        raise ConfigError(_unknown(word, shipped))
    return shipped[word].spec


def _is_path(word: str, base: Path) -> bool:
    path = base / expanded(word)
    return "/" in word or "\\" in word or path.suffix in {*SUFFIXES, ".yaml", ".yml"} or os.path.isdir(path)


def _unknown(name: str, shipped: Mapping[str, Any]) -> str:
    return (
        f"{shown(name)} is not a shipped task; {did_you_mean(name, shipped)} "
        "A task of your own is a folder or file path (with a '/'), or a mapping with 'name' and 'source'."
    )


def _complete(task: dict[str, Any], base: Path) -> dict[str, Any]:
    """Read off the rows what a task over files left open: its conversation, choices, answer, id and score.

    Files whose columns are prompt, completion and perhaps choices, answer and id need nothing but a source.
    """
    if task.get("prompt") is not None or task.get("messages") is not None:
        return task
    try:
        source = build(_Source, {"source": task["source"]}, where="source", base=base).source
    except ConfigError:
        return task  # the whole task is validated next, and all its problems are told together
    if not isinstance(source, FilesSource):
        return task
    facts = facts_of(source, task.get("keep"))
    row = facts.first
    _complete_preference(task, facts)
    if task.get("messages") is not None:
        pass
    elif is_conversation(row.get("prompt")) and "choices" in row:
        task["messages"] = "prompt"
    elif is_conversation(row.get("prompt")) and is_conversation(row.get("completion")):
        task["messages"] = "[prompt, completion]"  # trl's form
    elif is_conversation(row.get("prompt")):
        if task.get("completion") is None:
            raise DataError(
                f"{_first_file(source)}: prompt is a list of turns and completion is {shown(row.get('completion'))}; "
                'expected a list of turns in both: "completion": [{"role": "assistant", "content": "..."}].'
            )
        task["messages"] = "prompt"
    elif "messages" in facts.with_column and "prompt" not in row:
        task["messages"] = "messages"
    elif "conversations" in row and "prompt" not in row:
        task["messages"] = "conversations"  # ShareGPT's name
    elif not {"prompt", "completion"} <= set(row) and task.get("completion") is None and "choices" not in row:
        raise DataError(
            f"{_first_file(source)} has the columns {listed(row)}; without a 'prompt' template, the "
            'columns prompt and completion are expected. Write the templates, e.g. prompt: "{{ question }}\\nAnswer:".'
        )
    if task.get("messages") is not None and "tools" in facts.with_column:
        task.setdefault("tools", "row.get('tools')")
    if task.get("choices") is None and facts.everywhere("choices"):
        task["choices"] = "choices"
    if "answer" in facts.with_column:
        task.setdefault("answer", "answer")
    if "id" in facts.with_column:
        task.setdefault("id", "id")
    if task.get("score") is None and task.get("choices") is None and task.get("answer") == "answer":
        task["score"] = facts.score()[0]
        if task["score"] in facts.stop_inside:
            task.setdefault("stop", [])  # the usual one would cut a right answer
    return task


def _complete_preference(task: dict[str, Any], facts: Facts) -> None:
    """Read off the rows what is preferred to what: trl's columns chosen and rejected, or rejected alone."""
    row = facts.first
    pair = "chosen" in facts.with_column and "completion" not in facts.with_column
    if pair and is_conversation(row.get("chosen")):
        task["messages"] = "[prompt, chosen]" if is_conversation(row.get("prompt")) else "chosen"
        task.setdefault("rejected", " {{ rejected[-1].content }}")
    elif pair:
        task.setdefault("completion", "{{ chosen }}")
    # beside a completion it must be in every row: the rows are good for other objectives without it
    beside = isinstance(row.get("rejected"), str) and "rejected" not in facts.without_column
    if pair or beside:
        task.setdefault("rejected", "{{ rejected }}")


def _first_file(source: FilesSource) -> Path:
    return next(iter(split_files(source).values()))[0]


class _Source(Strict):
    """A source alone, to look at its files before the rest of the task is known."""

    source: Source
