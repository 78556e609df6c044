"""Medians, quartiles and ratios of samples that were taken side by side."""

from __future__ import annotations

import pytest

from multiflora.bench.stats import extra_ratio, median, over_floor, ratio, spread, total


def test_spread_is_median_and_quartiles():
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 2.0, 4.0)
    assert median([4.0, 1.0]) == 2.5


def test_ratios_are_formed_within_rounds():
    # a load that comes in the third round hits both: the ratio does not see it
    assert ratio([1.0, 1.0, 10.0], [2.0, 2.0, 20.0]) == (0.5, 0.5, 0.5)
    # of sorted samples every ratio would be 1
    assert ratio([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx((1.0, 2 / 3, 2.0))


def test_extra_ratio_takes_the_base_off_within_rounds():
    base = [10.0, 100.0, 1000.0]
    ours, other = [b + 1 for b in base], [b + 4 for b in base]
    assert extra_ratio(ours, other, base).value == pytest.approx(0.25)


def test_extra_ratio_divides_medians_and_not_rounds():
    # added: 1, 3 and 5 over 4, 2 and 6; the median of the rounds' own ratios would be 5/6
    assert extra_ratio([3.0, 5.0, 7.0], [6.0, 4.0, 8.0], [2.0, 2.0, 2.0]).value == pytest.approx(0.75)


def test_quartiles_of_a_ratio_hold_it_and_come_back():
    ours = [2.0 + 0.01 * (i % 7) for i in range(30)]
    other = [4.0 + 0.02 * (i % 5) for i in range(30)]
    first, again = (extra_ratio(ours, other, [1.0] * 30) for _ in range(2))
    assert first == again
    assert first.low <= first.value <= first.high
    assert first.low < first.high


def test_over_floor():
    assert over_floor([5.0, 7.0, 6.0], [2.0, 4.0, 3.0], [1.5, 1.5, 1.5]).value == 2.0


def test_total_adds_the_phases_of_each_round():
    seconds = {
        "packed": {
            "forward": {"cpu": [1.0, 2.0], "wall": [9.0, 9.0]},
            "backward": {"cpu": [3.0, 5.0], "wall": [9.0, 9.0]},
        }
    }
    assert total(seconds, "packed", "cpu") == [4.0, 7.0]
