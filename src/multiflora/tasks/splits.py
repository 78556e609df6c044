"""Cutting one list of rows into disjoint splits, and keeping what one split has out of another: pure functions."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from multiflora.tasks.spec import Split

__all__ = ["cut", "normalised", "without_shared"]


def cut(groups: Sequence[str], sizes: Mapping[Split, float], seed: int) -> dict[Split | None, list[int]]:
    """Deal row numbers into splits; rows of one group stay together.

    Args:
        groups: Each row's group.
        sizes: Wanted size of each split: a fraction of all rows below 1, else a number of rows. A split may come out
            larger, by less than its last group.
        seed: Seed of the order in which groups are dealt.

    Returns:
        Row numbers of each split in rising order; what is left is under None.

    Example:
        >>> parts = cut(list("aabbcd"), {"test": 2}, seed=0)
        >>> sorted(parts["test"] + parts[None]), len(parts["test"]) in (2, 3)
        ([0, 1, 2, 3, 4, 5], True)
    """
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    order = list(members)
    random.Random(seed).shuffle(order)
    parts: dict[Split | None, list[int]] = {}
    for split, size in sizes.items():
        wanted = max(1, round(size * len(groups))) if size < 1 else int(size)
        taken: list[int] = []
        while order and len(taken) < wanted:
            taken += members[order.pop()]
        parts[split] = sorted(taken)
    parts[None] = sorted(i for group in order for i in members[group])
    return parts


def without_shared(rows: Sequence[tuple[str, str | None]], others: Sequence[tuple[str, str | None]]) -> list[int]:
    """Numbers of the rows that share neither prompt nor group with the others.

    Args:
        rows: Prompt and group (or None) of each row.
        others: The same of the splits that keep what they have.

    Example:
        >>> without_shared([("What is 2?", None), ("New", "g"), ("Newer", "h")], [("what  is 2?", None), ("x", "g")])
        [2]
    """
    prompts = {normalised(prompt) for prompt, _ in others}
    groups = {group for _, group in others} - {None}
    return [i for i, (prompt, group) in enumerate(rows) if normalised(prompt) not in prompts and group not in groups]


def normalised(prompt: str) -> str:
    """Lower case, every run of white space one space: prompts that differ only so are the same."""
    return " ".join(prompt.lower().split())
