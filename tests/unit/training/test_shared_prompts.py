"""Answers in groups of like length."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from multiflora.training.shared_prompts import SAVED, by_length


@given(st.lists(st.integers(0, 2000), min_size=1, max_size=40))
def test_every_row_is_in_one_group_and_no_cut_saves_less_than_it_costs(lengths: list[int]) -> None:
    groups = by_length(torch.tensor(lengths))
    assert sorted(row for rows, _ in groups for row in rows.tolist()) == list(range(len(lengths)))
    for rows, width in groups:
        assert max(lengths[row] for row in rows) == width
    for (_, longer), (rows, width) in pairwise(groups):
        rest = sum(len(rows) for rows, other in groups if other <= width)
        assert (longer - width) * rest >= SAVED


def test_one_long_answer_does_not_fill_up_the_others() -> None:
    groups = by_length(torch.tensor([4, 500, 3]))
    assert [(rows.tolist(), width) for rows, width in groups] == [([1], 500), ([0, 2], 4)]
