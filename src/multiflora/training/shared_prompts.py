"""What the prompts of a batch leave behind, each read once for all of its answers.

Several answers are written to each prompt, and the prompt is most of what there is to read: with four answers of five
tokens to a prompt of eighty, 340 tokens by rows, and 100 where its keys and values are kept for all four. Gradients go
through what is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from multiflora.context import task
from multiflora.kept_rows import has_rows, is_recurrent, rows_of
from multiflora.methods.layer_pass import BranchLayer

__all__ = ["Prompts", "by_length", "may_share", "once", "read", "together"]

SAVED = 256
"""Tokens of fill that a forward pass of its own must save: fewer cost less than the pass."""


class Prompts(NamedTuple):
    """What was read of the prompts of a batch, once for all rows that have the same."""

    kept: DynamicCache
    """Keys and values of all tokens but each prompt's last, which the answer's first is read from."""
    which: Tensor
    """(B,) the prompt of every row."""
    lengths: Tensor
    """(B,) how many tokens those are, padding left out."""

    def behind(self, rows: Tensor | slice = slice(None)) -> DynamicCache:
        """What these rows stand behind; all of them, if none are named."""
        return rows_of(self.kept, self.which[rows])


def may_share(model: nn.Module) -> bool:
    """Whether reading a prompt once is the same to a model as reading it with every answer.

    Not where a state is kept in the place of keys and values, where activations are made again for the gradient, where
    a learned prompt stands in front, and where an adapter adds a loss of its own, which a prompt would be in once.

    Args:
        model: A causal language model, with an adapter or without.
    """
    configs = getattr(model, "peft_config", {}).values()
    if is_recurrent(model) or any(config.is_prompt_learning or config.is_adaption_prompt for config in configs):
        return False
    return not any(
        getattr(module, "gradient_checkpointing", False) or (isinstance(module, BranchLayer) and _adds_loss(module))
        for module in model.modules()
    )


def _adds_loss(layer: BranchLayer) -> bool:
    losses = ((layer.method.of(config).loss, config) for config in layer.configs.values())
    return any(loss is not None and loss.on(config) for loss, config in losses)


def read(model: Any, adapted: nn.Module, ids: Tensor, mask: Tensor, tasks: Tensor) -> Prompts | None:
    """Read each prompt of a batch once, without its last token.

    Args:
        model: What answers: a causal language model, or a `Reference` to it.
        adapted: The model itself, whose adapter is told the tasks.
        ids: (B, P) ids of the prompts, padded on the left.
        mask: (B, P), 0 for padding.
        tasks: (B,) number of each row's task: one text is two prompts where they are of two tasks.
    Returns:
        What each row's answer stands behind; None where nothing is saved, or where the model keeps something else.
    """
    ids, mask = ids[:, :-1], mask[:, :-1]
    first, which = once(tasks.to(ids.device)[:, None], mask, ids)
    if len(first) == len(ids) or not ids.shape[1]:
        return None
    mask_once = mask[first]
    with task(adapted, tasks[first.to(tasks.device)].tolist()):
        found = model(
            input_ids=ids[first],
            attention_mask=mask_once,
            position_ids=(mask_once.cumsum(-1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
    kept = getattr(found, "past_key_values", None)
    return Prompts(kept, which, mask.sum(-1)) if has_rows(kept) else None


def once(*columns: Tensor) -> tuple[Tensor, Tensor]:
    """Find the rows that differ.

    Args:
        columns: (B, ...) whole numbers; rows are equal where all of them are.
    Returns:
        (D,) one place of each different row, and (B,) which of those every row is.
    Example:
        >>> first, which = once(torch.tensor([[7], [5], [7]]))
        >>> which.tolist(), len(first)
        ([1, 0, 1], 2)
    """
    rows = torch.cat(columns, 1)
    which = torch.unique(rows, dim=0, return_inverse=True)[1]
    first = which.new_empty(int(which.max()) + 1)
    return first.scatter_(0, which, torch.arange(len(rows), device=rows.device)), which


def together(parts: Sequence[Mapping[str, Any]], key: str) -> list[dict[str, Any]]:
    """Deal the rows of several batches out anew, so that those of one key lie together.

    Args:
        parts: Batches of the same fields: tensors with the rows in front, or what all rows share.
        key: Field of whole numbers that rows of one group have in common.
    Returns:
        Batches of the same sizes; the groups in the order of their first rows, the rows of each in theirs.
    Example:
        >>> [part["x"].tolist() for part in together([{"x": torch.tensor([4, 7])}, {"x": torch.tensor([7, 4])}], "x")]
        [[4, 4], [7, 7]]
    """
    keys = torch.cat([part[key] for part in parts]).tolist()
    first = {found: row for row, found in reversed(list(enumerate(keys)))}
    order = sorted(range(len(keys)), key=lambda row: first[keys[row]])
    ends = list(itertools.accumulate((len(part[key]) for part in parts), initial=0))
    dealt: list[dict[str, Any]] = [dict(part) for part in parts]
    for name, value in parts[0].items():
        if isinstance(value, Tensor) and value.ndim:
            joined = torch.cat([part[name] for part in parts])[order]
            for part, (start, end) in zip(dealt, itertools.pairwise(ends), strict=True):
                part[name] = joined[start:end]
    return dealt


def by_length(lengths: Tensor) -> list[tuple[Tensor, int]]:
    """Answers in groups of like length: one that does not end fills up a whole batch of short ones.

    Args:
        lengths: (B,) tokens of each answer.
    Returns:
        For each group its rows and the length of its longest, the longest group first.
    Example:
        >>> by_length(torch.tensor([4, 500, 3]))
        [(tensor([1]), 500), (tensor([0, 2]), 4)]
    """
    order = lengths.argsort(descending=True, stable=True)
    sizes = lengths[order].tolist()
    groups, start = [], 0
    while start < len(sizes):
        # the cut that saves most fill
        saved, cut = max(((sizes[start] - sizes[i]) * (len(sizes) - i), i) for i in range(start, len(sizes)))
        end = cut if saved >= SAVED else len(sizes)
        groups.append((order[start:end], sizes[start]))
        start = end
    return groups
