"""Every row keeps the name of its task, from axolotl's data sets through its packing into the batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from axolotl.common.datasets import TrainDatasetMeta, load_datasets
from axolotl.utils.data import sft
from torch import Tensor

from multiflora.errors import ConfigError, DataError
from multiflora.integrations.axolotl.section import task_of

__all__ = ["TASK", "TaskCollator", "load_with_tasks"]

TASK = "multiflora_task"
"""The column with the name of each row's task."""


def load_with_tasks(cfg: Any) -> TrainDatasetMeta:
    """Load a config's data sets as axolotl does, with the column.

    Raises:
        ConfigError: The rows were prepared earlier, without it.
    """
    with _named():
        loaded = load_datasets(cfg=cfg)
    for rows in (loaded.train_dataset, loaded.eval_dataset):
        if rows is not None and TASK not in rows.column_names:
            raise ConfigError(
                f"The rows in {cfg.dataset_prepared_path} were prepared for another adapter, without the names of "
                "their tasks. Name another folder as dataset_prepared_path, or remove this one."
            )
    return loaded


@contextmanager
def _named() -> Iterator[None]:
    """Inside, every data set gets the column before axolotl puts it together with the others."""
    tokenized = sft.get_dataset_wrapper

    def named(dataset_config: Any, **words: Any) -> Any:
        rows, prompter = tokenized(dataset_config=dataset_config, **words)
        return rows.add_column(TASK, [task_of(dataset_config)] * len(rows)), prompter

    sft.get_dataset_wrapper = named
    try:
        yield
    finally:
        sft.get_dataset_wrapper = tokenized


class TaskCollator:
    """Axolotl's collator, whose batches also have ``task_id`` and ``real_tokens``, both (rows, length).

    Args:
        collator: Axolotl's: it pads, packs or flattens.
        tasks: The adapter's tasks, in the order of their numbers.
    """

    def __init__(self, collator: Any, tasks: Sequence[str]) -> None:
        self.collator, self.tasks = collator, list(tasks)

    def __getattr__(self, name: str) -> Any:
        # axolotl asks its collator for the tokenizer and the padding
        if name == "collator" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, features: Sequence[Any], return_tensors: str | None = None) -> Any:
        """Collate examples, or lists of examples of which each makes one packed row."""
        packed = isinstance(features[0], list)
        rows = [list(row) for row in features] if packed else [[example] for example in features]
        plain = [[{k: v for k, v in example.items() if k != TASK} for example in row] for row in rows]
        batch = self.collator(plain if packed else [example for row in plain for example in row])
        if TASK not in rows[0][0]:
            return batch
        height, width = batch["input_ids"].shape
        if height == 1:  # flattened, or all in one packed row
            rows = [[example for row in rows for example in row]]
        left = getattr(self.collator, "tokenizer", None) is not None and self.tokenizer.padding_side == "left"
        batch["task_id"] = _filled([self._ids(row) for row in rows], width, left, None)
        batch["real_tokens"] = _filled([[1] * sum(_lengths(row)) for row in rows], width, left, 0)
        return batch

    def _ids(self, row: Sequence[Mapping[str, Any]]) -> list[int]:
        numbers = [self._number(example[TASK]) for example in row]
        return [number for number, length in zip(numbers, _lengths(row), strict=True) for _ in range(length)]

    def _number(self, name: str) -> int:
        if name not in self.tasks:
            raise DataError(
                f"A row is of the task {name!r}, and the adapter's tasks are {', '.join(self.tasks)}. Give the data "
                "set the name of one of them."
            )
        return self.tasks.index(name)


def _lengths(row: Sequence[Mapping[str, Any]]) -> list[int]:
    return [len(example["input_ids"]) for example in row]


def _filled(rows: Sequence[Sequence[int]], width: int, left: bool, fill: int | None) -> Tensor:
    """Rows of one width, filled where axolotl fills; with what stands beside, where ``fill`` is None."""
    made = []
    for row in rows:
        rest = [row[0 if left else -1] if fill is None else fill] * (width - len(row))
        made.append([*rest, *row] if left else [*row, *rest])
    return torch.tensor(made)
