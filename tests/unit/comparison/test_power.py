"""What a comparison can see, against scipy's and against the tests themselves."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from multiflora.comparison.power import detectable, power, seeds_to_decide
from multiflora.comparison.statistics import Spread, p_value


@pytest.mark.parametrize(("freedom", "level"), [(2, 0.02), (4, 0.0025), (9, 0.02)])
def test_without_rows_the_power_is_that_of_the_t_test(freedom, level):
    size = 4.0
    critical = stats.t.isf(level / 2, freedom)
    expected = stats.nct.sf(critical, freedom, size) + stats.nct.cdf(-critical, freedom, size)
    assert power(size, Spread(0.0, 1.0, freedom), level) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("spread", [Spread(0.0, 1.0, 2), Spread(1.0, 1.0, 2), Spread(1.0, 0.3, 4)])
def test_what_could_be_seen_is_found_four_times_out_of_five_by_the_rule_itself(spread):
    generator = np.random.default_rng(0)
    size, found = detectable(spread, 0.02), 0
    for _ in range(1000):
        seeds = spread.seeds * generator.chisquare(spread.freedom) / spread.freedom
        seen = generator.normal(size, np.sqrt(spread.rows + spread.seeds))
        found += p_value(seen, spread._replace(seeds=seeds)) < 0.02
    assert found / 1000 == pytest.approx(0.8, abs=0.04)


def test_the_seeds_that_decide_are_the_fewest_that_do():
    spread = Spread(rows=0.01, seeds=1.0, freedom=2)
    more = seeds_to_decide(1.2, spread, 0.02)
    assert power(1.2, spread.with_seeds(3 + more), 0.02) >= 0.8
    assert power(1.2, spread.with_seeds(3 + more - 1), 0.02) < 0.8


def test_a_margin_decides_where_no_difference_is():
    spread = Spread(rows=0.0, seeds=1.0, freedom=2)
    assert seeds_to_decide(0.0, spread, 0.02) is None
    assert seeds_to_decide(0.0, spread, 0.02, margin=1.2) == seeds_to_decide(1.2, spread, 0.02)


def test_no_number_of_seeds_makes_up_for_rows():
    assert seeds_to_decide(1.0, Spread(rows=1.0, seeds=0.1, freedom=2), 0.02) is None
