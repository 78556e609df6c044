"""Examples become the tensors of one batch, padded or folded into rows; every row or token keeps its task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multiflora.data.batches import fold
from multiflora.data.encode import IGNORED

__all__ = ["Collator", "fold_batch", "pad_batch"]


_OF_EXAMPLES: Mapping[str, float] = {"example": -1, "loss_weight": 0.0}
"""Columns that examples may have, a number each, and what they are for the fill at the end of a folded row."""


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Collates pre-encoded examples; a picklable callable for ``DataLoader``."""

    pad_token_id: int
    """Fills rows up; any id will do, as it is neither attended to nor predicted."""
    packing: bool = False
    """Fold examples into rows instead of padding each one."""
    max_length: int = 1024
    """Longest folded row, in tokens."""

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the tensors of one batch: see `pad_batch` and `fold_batch`."""
        if self.packing:
            return fold_batch(examples, pad_token_id=self.pad_token_id, max_length=self.max_length)
        return pad_batch(examples, pad_token_id=self.pad_token_id)


def pad_batch(examples: Sequence[Mapping[str, Any]], *, pad_token_id: int) -> dict[str, Tensor]:
    """Pad examples on the right to the longest of them.

    Args:
        examples: Each with ``input_ids``, ``labels`` and ``task_id``.
        pad_token_id: Fills ``input_ids``.
    Returns:
        ``input_ids``, ``labels``, ``attention_mask`` (B, T), ``task_id`` (B,), ``row_length`` (B,) in tokens, and,
        where the examples have them, their numbers ``example`` (B,) and ``loss_weight`` (B,), float32.
    """
    lengths = torch.tensor([len(e["input_ids"]) for e in examples])
    width = int(lengths.max())
    own = {key: torch.tensor([e[key] for e in examples]) for key in _OF_EXAMPLES if key in examples[0]}
    return {
        "input_ids": _stack([e["input_ids"] for e in examples], width, pad_token_id),
        "labels": _stack([e["labels"] for e in examples], width, IGNORED),
        "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
        "task_id": torch.tensor([int(e["task_id"]) for e in examples]),
        "row_length": lengths,
        **own,
    }


def fold_batch(examples: Sequence[Mapping[str, Any]], *, pad_token_id: int, max_length: int) -> dict[str, Tensor]:
    """Fold the same examples into few rows: the batch's loss is unchanged, nearly all of its padding is gone.

    ``position_ids`` start at 0 with every example. transformers reads from them which tokens belong together, and
    builds the block-diagonal mask, provided that no ``attention_mask`` is given and ``use_cache`` is False. The fill at
    the end of a row counts as one more example, with no loss; its task is that of the row's last example.

    Args:
        examples: Each with ``input_ids``, ``labels`` and ``task_id``.
        pad_token_id: Fills ``input_ids``.
        max_length: Longest row, in tokens.
    Returns:
        ``input_ids``, ``labels``, ``position_ids``, ``task_id`` (R, T), ``row_length`` (R,), in tokens, and, where the
        examples have them, ``example`` (R, T) and ``loss_weight`` (R, T).
    """
    lengths = [len(e["input_ids"]) for e in examples]
    rows = fold(lengths, max(max_length, *lengths))
    row_length = torch.tensor([sum(lengths[i] for i in row) for row in rows])
    width = int(row_length.max())
    fill = [[*range(width - int(length))] for length in row_length]
    tasks = [_of_tokens(examples, row, "task_id") for row in rows]
    own = {
        key: _stack([_of_tokens(examples, row, key) for row in rows], width, fill_value)
        for key, fill_value in _OF_EXAMPLES.items()
        if key in examples[0]
    }
    return {
        "input_ids": _stack([_join(examples, row, "input_ids") for row in rows], width, pad_token_id),
        # a first token is not predicted, least of all from the example before it
        "labels": _stack(
            [[x for i in row for x in (IGNORED, *examples[i]["labels"][1:])] for row in rows], width, IGNORED
        ),
        "position_ids": torch.tensor(
            [[p for i in row for p in range(lengths[i])] + rest for row, rest in zip(rows, fill, strict=True)]
        ),
        "task_id": torch.tensor([of + [of[-1]] * len(rest) for of, rest in zip(tasks, fill, strict=True)]),
        "row_length": row_length,
        **own,
    }


def _join(examples: Sequence[Mapping[str, Any]], row: Sequence[int], column: str) -> list[int]:
    """Concatenate one column of a row's examples."""
    return [x for i in row for x in examples[i][column]]


def _of_tokens(examples: Sequence[Mapping[str, Any]], row: Sequence[int], column: str) -> list[Any]:
    """Repeat the number that each of a row's examples has in one column for all of its tokens."""
    return [examples[i][column] for i in row for _ in examples[i]["input_ids"]]


def _stack(rows: Sequence[Sequence[float]], width: int, fill: float) -> Tensor:
    """Pad lists on the right to one tensor."""
    return torch.tensor([[*row, *([fill] * (width - len(row)))] for row in rows])
