"""Batches with little padding lose no example, keep to their limits and mix as before."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiflora.data.batches import fold, group_by_length

lengths_of_examples = st.lists(st.integers(1, 100), min_size=1, max_size=24)


def padding(lengths: np.ndarray, batch_size: int) -> float:
    batches = [lengths[i : i + batch_size] for i in range(0, len(lengths), batch_size)]
    return sum(len(b) * b.max() for b in batches) / lengths.sum() - 1


@given(lengths_of_examples, st.integers(1, 5), st.integers(1, 4), st.integers(0, 9))
def test_grouping_reorders_within_its_window_only(lengths: list[int], size: int, window: int, seed: int) -> None:
    order = group_by_length(np.array(lengths), size, seed=seed, window=window)
    assert sorted(order) == list(range(len(lengths)))
    assert all(new // (size * window) == old // (size * window) for new, old in enumerate(order))
    assert order.tolist() == group_by_length(np.array(lengths), size, seed=seed, window=window).tolist()


def test_grouping_of_nothing_is_nothing() -> None:
    assert group_by_length(np.array([], dtype=np.int64), 4, seed=0).tolist() == []


def test_grouping_keeps_the_short_batch_last() -> None:
    lengths = np.array([1, 9, 9, 9, 9, 9, 2])
    order = group_by_length(lengths, 2, seed=0, window=8)
    first_batches = [sorted(lengths[order[i : i + 2]]) for i in range(0, 6, 2)]
    assert sorted(map(tuple, first_batches)) == [(1, 2), (9, 9), (9, 9)]


def test_grouping_cuts_padding_and_does_not_sort_the_steps() -> None:
    lengths = np.random.default_rng(0).integers(10, 300, size=512)
    grouped = lengths[group_by_length(lengths, 8, seed=0)]
    assert padding(grouped, 8) < 0.35 * padding(lengths, 8)
    longest = grouped.reshape(-1, 8).max(axis=1)
    assert 0.3 < np.mean(np.diff(longest) > 0) < 0.7


@given(lengths_of_examples, st.integers(100, 400))
def test_folding_places_every_example_once_within_the_limit(lengths: list[int], limit: int) -> None:
    rows = fold(lengths, limit)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in row) for row in rows) <= limit
    assert all(rows)


def test_folding_removes_nearly_all_padding() -> None:
    draws = np.random.default_rng(0).lognormal(4.3, 0.8, size=(200, 8)).astype(int) + 5
    laid = [(batch.tolist(), fold(batch.tolist(), 2048)) for batch in draws]
    tokens = sum(len(rows) * max(sum(batch[i] for i in row) for row in rows) for batch, rows in laid)
    assert tokens / draws.sum() < 1.05
    assert (8 * draws.max(axis=1)).sum() / draws.sum() > 1.8  # what padding would have made of it


def test_folding_prefers_narrow_rows_where_padding_is_equal() -> None:
    assert fold([64] * 4, 1024) == [[0], [1], [2], [3]]


def mixed_plan(size: int, shares: tuple[float, ...] = (0.25, 0.25, 0.25, 0.25)) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and tasks of a shuffled plan: the tasks' lengths hardly overlap."""
    draw = np.random.default_rng(0)
    tasks = draw.permutation(np.repeat(np.arange(len(shares)), [round(share * size) for share in shares]))
    return draw.integers(10, 30, len(tasks)) + 40 * tasks, tasks


@pytest.mark.parametrize(("step", "part"), [(8, 8), (32, 8), (8, 4)])
def test_every_batch_and_every_part_of_a_step_holds_every_task(step: int, part: int) -> None:
    lengths, tasks = mixed_plan(2048)
    order = group_by_length(lengths, step, tasks=tasks, seed=0)
    assert sorted(order.tolist()) == list(range(2048))
    held = [len(set(tasks[order[i : i + part]])) for i in range(0, 2048, part)]
    alone = [len(set(tasks[group_by_length(lengths, step, seed=0)][i : i + part])) for i in range(0, 2048, part)]
    assert np.mean(np.array(alone) == 1) > 0.1  # by length alone, tasks of different length come apart
    assert min(held) > 1
    assert np.mean(np.array(held) == 4) > (0.95 if part > 4 else 0.5)


def test_a_tasks_share_of_a_batch_is_that_of_the_window() -> None:
    lengths, tasks = mixed_plan(640, (0.7, 0.2, 0.1))
    order = group_by_length(lengths, 10, tasks=tasks, seed=0)
    counts = np.array([np.bincount(tasks[order[i : i + 10]], minlength=3) for i in range(0, 640, 10)])
    window = counts.reshape(8, 8, 3).mean(axis=1, keepdims=True)
    assert np.abs(counts.reshape(8, 8, 3) - window).max() < 2


def test_a_task_is_of_like_length_within_a_batch() -> None:
    lengths, tasks = mixed_plan(2048)
    order = group_by_length(lengths, 16, tasks=tasks, seed=0)
    spread = [np.ptp(lengths[b][tasks[b] == task]) for b in order.reshape(-1, 16) for task in range(4)]
    plain = [np.ptp(lengths[b][tasks[b] == 0]) for b in np.arange(2048).reshape(-1, 16) if (tasks[b] == 0).any()]
    assert np.mean(spread) < 0.35 * np.mean(plain)


def test_what_a_step_reads_does_not_depend_on_who_shares_it() -> None:
    # the data loader deals a step's examples out in runs of a forward pass: the step's set is the same for any number
    lengths = np.random.default_rng(0).integers(1, 60, 200)
    order = group_by_length(lengths, 16, seed=0)
    assert sorted(order.tolist()) == list(range(200))
    for step in range(200 // 16):
        of_step = lengths[order[step * 16 : (step + 1) * 16]]
        assert (np.diff(of_step) >= 0).all()  # of one task, so each forward pass has examples of like length, too
