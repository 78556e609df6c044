"""Looks share one level, and none is taken twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from multiflora.comparison.looks import RESERVE, Look, levels, look_at, planned_looks, read_looks, record_look
from multiflora.comparison.statistics import CLAIM


@pytest.mark.parametrize("plan", [(3,), (3, 5, 8, 10), (2, 3, 5, 8, 12, 18, 20)])
def test_planned_looks_spend_the_level_and_no_more(plan):
    assert sum(levels(plan).values()) == pytest.approx(CLAIM)
    assert planned_looks(plan[0], plan[-1]) == plan
    assert min(levels(plan).values()) > 0


def test_between_two_looks_nothing_may_be_claimed():
    assert look_at(range(4), (3, 5)).level == 0
    assert look_at(range(5), (3, 5)).level == levels((3, 5))[5]


def test_seeds_added_to_a_finished_comparison_spend_a_reserve(tmp_path: Path):
    """Three seeds, then five, then seven, as whoever hopes for a winner does: all of it stays below 2.5 of 100."""
    spent = 0.0
    for number in (3, 5, 7, 9, 11):
        cells = [f"lora-seed{k}" for k in range(number)]
        look = look_at(range(number), (number,), read_looks(tmp_path, cells))
        assert look.extra == (number > 3)
        record_look(tmp_path, look, range(number), cells)
        again = look_at(range(number), (number,), read_looks(tmp_path, cells))
        assert again == look  # the same numbers, looked at once more
        spent += look.level
    assert CLAIM < spent < CLAIM + RESERVE == 0.025


def test_planned_looks_follow_each_other_at_their_own_levels(tmp_path: Path):
    plan = (3, 5, 8, 10)
    for number in plan:
        cells = [f"lora-seed{k}" for k in range(number)]
        look = look_at(range(number), plan, read_looks(tmp_path, cells))
        assert look == Look(number, levels(plan)[number], plan)
        record_look(tmp_path, look, range(number), cells)


def test_other_seeds_in_place_of_the_first_ones_are_another_look(tmp_path: Path):
    record_look(tmp_path, look_at([0, 1, 2], (3,)), [0, 1, 2], ["lora-seed0-a", "lora-seed2-a"])
    assert look_at([0, 1, 5], (3,), read_looks(tmp_path, ["lora-seed0-a", "lora-seed5-a"])).extra
    assert not look_at([0, 1, 2], (3,), read_looks(tmp_path, ["lora-seed0-b"])).extra  # another recipe's cells
