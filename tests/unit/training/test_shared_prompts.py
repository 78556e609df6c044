"""Answers in groups of like length, and of one prompt."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from multiflora.training.shared_prompts import SAVED, by_length, together


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


@given(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=5))
def test_rows_of_one_key_lie_together_and_every_row_stays_whole(keys: list[list[int]]) -> None:
    parts = [
        {"key": torch.tensor(own), "row": torch.arange(3) + 3 * i, "wide": torch.tensor(own)[:, None], "all": "same"}
        for i, own in enumerate(keys)
    ]
    dealt = together(parts, "key")
    assert [{len(part[name]) for name in ("key", "row", "wide")} for part in dealt] == [{3}] * len(parts)
    assert all(part["all"] == "same" for part in dealt)
    flat, rows, wide = (torch.cat([part[name] for part in dealt]).flatten().tolist() for name in ("key", "row", "wide"))
    assert [keys[row // 3][row % 3] for row in rows] == flat == wide
    assert sorted(rows) == list(range(3 * len(keys)))
    assert sum(a != b for a, b in pairwise(flat)) == len(set(flat)) - 1
