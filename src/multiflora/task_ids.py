"""Which task is meant: a name or a number, checked against an adapter's own list of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from multiflora.errors import AdapterError

__all__ = ["TaskName", "Which", "are_numbers", "check_range", "checked_ids", "index_of", "knows", "missing"]

TaskName = str | int
Which = TaskName | Sequence[TaskName]


def missing(config: Any) -> AdapterError:
    """The error for a method that needs tasks and got none."""
    if config.num_tasks is None:
        return AdapterError(
            f"{type(config).__name__}: num_tasks is None; a method gated by task, or with a loss between tasks, must "
            "know how many there are. Set num_tasks=N or task_names=[...]."
        )
    return AdapterError(
        f"A {config.method_name} adapter needs the task of each row, and none was given. Pass task_id=... with the "
        f"batch or use `with multiflora.task(model, TASK):`; its tasks are {_names(config)}."
    )


def index_of(config: Any, which: TaskName) -> int:
    """A task's id, from its name or id, checked against the config.

    Raises:
        AdapterError: There is no such task; the message lists those there are.
    """
    if knows(config, which):
        return int(config.task_names.index(which)) if isinstance(which, str) else int(which)
    known = _names(config) if config.num_tasks else "not named in its config (set task_names)"
    raise AdapterError(f"The adapter has no task {which!r}; its tasks are {known}.")


def checked_ids(ids: Any, rows: int | None) -> Tensor | Sequence[TaskName]:
    """What came as ``task_id``: names as they are, everything else as a tensor."""
    given: Tensor | Sequence[TaskName]
    if isinstance(ids, str):
        given = [ids]
    elif isinstance(ids, (list, tuple)) and any(isinstance(one, str) for one in ids):
        given = list(ids)
    else:
        given = ids if isinstance(ids, Tensor) else torch.as_tensor(ids)
        if given.is_floating_point() or given.dtype == torch.bool or given.dim() not in (0, 1, 2):
            raise AdapterError(
                f"task_id is a tensor of {given.dtype} with shape {tuple(given.shape)}; it must hold whole numbers, "
                "one for each row, (rows,), or for each token, (rows, length)."
            )
        given = given.long()
    number = len(given) if not isinstance(given, Tensor) or given.dim() else 1
    if rows and number != 1 and number != rows:
        shape = tuple(given.shape) if isinstance(given, Tensor) else (number,)
        raise AdapterError(
            f"task_id has shape {shape}, but the batch has {rows} rows. Give one id for each row, (rows,), or for each "
            "token, (rows, length)."
        )
    return given


def check_range(config: Any, ids: Tensor) -> None:
    """Refuse ids that the adapter has no task for.

    Raises:
        AdapterError: An id is out of range.
    """
    # on a GPU this check would wait for the device; the collator has made it there
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or not ids.numel() or not config.num_tasks:
        return
    if not 0 <= int(ids.min()) <= int(ids.max()) < config.num_tasks:
        raise AdapterError(
            f"task_id goes from {int(ids.min())} to {int(ids.max())}, but the adapter has "
            f"{config.num_tasks} tasks ({_names(config)}). Give ids from 0 to {config.num_tasks - 1}."
        )


def are_numbers(ids: Any) -> bool:
    """Whether ids are numbers, and no names."""
    return isinstance(ids, Tensor) or not any(isinstance(one, str) for one in ids)


def _names(config: Any) -> str:
    return ", ".join(config.task_names) if config.task_names else f"0 to {(config.num_tasks or 0) - 1}"


def knows(config: Any, which: TaskName) -> bool:
    """Whether an adapter has a task of this name or number."""
    if isinstance(which, str):
        return which in (config.task_names or ())
    return config.num_tasks is None or 0 <= which < config.num_tasks
