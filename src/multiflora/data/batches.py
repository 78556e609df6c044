"""Batches with little padding that hold every task: like lengths side by side, or several examples in one row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["fold", "group_by_length"]

# Attention over this many positions costs about as much as a token's linear layers do: 6 × hidden size, here
# for models of some 0.3 billion parameters. Larger models could afford wider rows; the gain would be the last
# 2 % of padding.
_CHEAP_WIDTH = 4096

# first word of the seeds here, apart from those of the mixture
_GROUPS = 2**31


def group_by_length(
    lengths: npt.NDArray[np.int64],
    batch_size: int,
    *,
    tasks: npt.NDArray[np.int64] | None = None,
    seed: int,
    window: int = 8,
) -> npt.NDArray[np.int64]:
    r"""Reorder a plan so that batches hold examples of like length *of each task*, without moving any of them far.

    Sorted by length alone, short tasks and long ones would fall apart into batches of their own. So within each window
    of ``window`` batches, each example is placed by its rank among those of its own task: the r-th shortest of n
    examples stands at

    .. math:: (r + \tfrac12) / n

    and what is cut into batches is the order of these places. Every run of it, a batch as well as a part of one, holds
    the tasks in about the window's own shares, and each task's examples in it are of like length. Then the batches are
    shuffled. What an optimiser step learns from does not depend on how many processes or forward passes share it, if
    the batch is a whole step.

    Args:
        lengths: Length of each example in the order of the plan, in tokens.
        batch_size: Examples in a batch.
        tasks: Number of each example's task; None: all of one.
        seed: Seed of the order of batches within a window.
        window: Batches to sort together.
    Returns:
        Positions in the plan, in their new order.
    Example:
        >>> group_by_length(np.array([9, 1, 8, 2]), 2, tasks=np.array([0, 1, 0, 1]), seed=0)
        array([1, 2, 0, 3])
    """
    stretch = batch_size * window
    of = np.zeros(len(lengths), dtype=np.int64) if tasks is None else tasks
    order = []
    for start in range(0, len(lengths), stretch):
        placed = start + np.argsort(
            _places(lengths[start : start + stretch], of[start : start + stretch]), kind="stable"
        )
        batches = [placed[i : i + batch_size] for i in range(0, len(placed), batch_size)]
        # only the plan's last batch may be short, or all that follow would be cut elsewhere
        full = [batch for batch in batches if len(batch) == batch_size]
        shuffled = np.random.default_rng((seed, _GROUPS, start)).permutation(len(full))
        order += [full[i] for i in shuffled] + batches[len(full) :]
    return np.concatenate(order) if order else np.empty(0, dtype=np.int64)


def _places(lengths: npt.NDArray[np.int64], tasks: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Where each example stands, from 0 to 1, among those of its task by length."""
    places = np.empty(len(lengths))
    for task in np.unique(tasks):
        mine = (tasks == task).nonzero()[0]
        places[mine[np.argsort(lengths[mine], kind="stable")]] = (np.arange(len(mine)) + 0.5) / len(mine)
    return places


def fold(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Lay a batch's examples into few rows of nearly equal length, none longer than ``max_length``.

    The longest example goes first and each next one into the shortest row (Graham 1969, longest processing
    time first), for every number of rows; the number with the least work for the model is taken, padding and
    attention counted.

    Args:
        lengths: Tokens of each example, each at most ``max_length``.
        max_length: Longest row, in tokens.
    Returns:
        Rows, each a list of positions in ``lengths``.
    Example:
        >>> fold([5, 1, 3, 2], max_length=6)
        [[0, 1], [2, 3]]
    """
    layouts = [_balance(lengths, rows) for rows in range(1, len(lengths) + 1)]

    def width(rows: list[list[int]]) -> int:
        return max(sum(lengths[i] for i in row) for row in rows)

    fitting = [rows for rows in layouts if width(rows) <= max_length]
    return min(fitting, key=lambda rows: len(rows) * width(rows) * (width(rows) + _CHEAP_WIDTH))


def _balance(lengths: Sequence[int], num_rows: int) -> list[list[int]]:
    """Spread examples over a number of rows, longest first, each into the row that is shortest so far."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    filled = [0] * num_rows
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        shortest = filled.index(min(filled))
        rows[shortest].append(i)
        filled[shortest] += lengths[i]
    return rows
