"""Weights of tokens: each step's sum to one, and a task's in its share of the step's examples."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from multiflora.data.weights import task_weights

examples = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 90)), min_size=1, max_size=40)


@given(examples, st.integers(1, 9))
def test_a_task_holds_its_share_of_each_steps_examples_whatever_its_tokens(
    rows: list[tuple[int, int]], size: int
) -> None:
    tasks, tokens = np.array(rows).T
    weights = task_weights(tasks, tokens, size)
    for start in range(0, len(rows), size):
        step = slice(start, start + size)
        mass = weights[step] * tokens[step]
        assert np.isclose(mass.sum(), 1.0)
        for task in set(tasks[step]):
            mine = tasks[step] == task
            assert np.isclose(mass[mine].sum(), mine.mean())
            assert np.ptp(weights[step][mine]) == 0  # within a task, every token counts the same


def test_over_many_steps_a_rare_task_weighs_what_the_mixture_says() -> None:
    draw = np.random.default_rng(0)
    tasks = (draw.random(8000) < 0.02).astype(int)
    mass = task_weights(tasks, np.where(tasks, 90, 3), 8) * np.where(tasks, 90, 3)
    assert np.isclose(mass[tasks == 1].sum() / mass.sum(), tasks.mean())


def test_a_task_without_a_labelled_token_weighs_nothing_and_breaks_nothing() -> None:
    assert task_weights(np.array([0, 1]), np.array([0, 2]), 2).tolist()[1] == 0.25
