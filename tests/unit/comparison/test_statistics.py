"""Statistics against scipy, against data with a known answer, and against methods that do not differ."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from multiflora.comparison.statistics import (
    Spread,
    crossed_tests,
    half_width,
    holm,
    macro_by_seed,
    p_value,
    paired_t,
    spread_of,
    t_interval,
)


def simulate(
    generator: np.random.Generator,
    *,
    effect: float = 0.0,
    seeds: int = 3,
    rows: tuple[int, ...] = (100, 100, 100, 100),
    luck: float = 0.02,
    noise: float = 0.3,
    own: float = 0.0,
) -> dict[str, np.ndarray]:
    """Outcomes of one method: rows of a difficulty, trainings with luck, noise, and what the method makes of a row."""
    found = {}
    for t, n in enumerate(rows):
        hard = np.random.default_rng(1000 + t).normal(0, 0.3, n)  # the same rows for every method
        training = generator.normal(0, luck, (seeds, 1))
        made = generator.normal(0, own, n)
        found[f"task{t}"] = 0.5 + effect + hard + training + made + generator.normal(0, noise, (seeds, n))
    return found


def against_zero(d: np.ndarray):
    """The crossed test of differences as they are."""
    return crossed_tests({"ours": {"t": d}, "other": {"t": 0 * d}}, "other")["ours"]


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12))
@settings(deadline=None)
def test_t_interval_is_scipys(values):
    interval = t_interval(values)
    if np.ptp(values) > 1e-6:
        low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
        assert (interval.low, interval.high) == pytest.approx((low, high))
    assert interval.mean == pytest.approx(np.mean(values))


def test_one_seed_has_no_interval():
    assert t_interval([0.5]) == (0.5, None, None)
    assert against_zero(np.ones((1, 50)))[:2] == ((1.0, None, None), None)
    assert paired_t([0.5], [0.4]).p is None


def test_paired_t_is_scipys():
    ours, other = [0.61, 0.64, 0.66, 0.59], [0.60, 0.61, 0.61, 0.60]
    assert paired_t(ours, other).p == pytest.approx(stats.ttest_rel(ours, other).pvalue)
    interval = stats.ttest_rel(ours, other).confidence_interval()
    assert paired_t(ours, other).interval[1:] == pytest.approx((interval.low, interval.high))


def test_equal_outcomes_are_no_difference():
    same = np.random.default_rng(0).normal(size=(3, 40))
    assert paired_t(same[:, 0], same[:, 0])[:2] == ((0.0, 0.0, 0.0), 1.0)
    assert crossed_tests({"a": {"t": same}, "b": {"t": same}}, "b")["a"][:2] == ((0.0, 0.0, 0.0), 1.0)


def test_two_methods_whose_rows_do_not_differ_get_the_paired_t_test_over_seeds():
    d = np.random.default_rng(3).normal(0, 0.2, (6, 1)) + np.zeros((6, 40))
    assert against_zero(d).p == pytest.approx(paired_t(d[:, 0], np.zeros(6)).p)
    assert against_zero(d).interval == pytest.approx(paired_t(d[:, 0], np.zeros(6)).interval)


def test_trainings_without_luck_leave_the_normal_law_of_the_rows():
    d = np.random.default_rng(4).normal(0.05, 1.0, 400)
    found = against_zero(np.tile(d, (3, 1)))
    assert found.p == pytest.approx(2 * stats.norm.sf(abs(d.mean()) / stats.sem(d)), rel=1e-3)
    low, high = stats.norm.interval(0.95, d.mean(), stats.sem(d))
    assert found.interval[1:] == pytest.approx((low, high), abs=1e-4)


def test_the_two_variances_by_hand():
    """Two seeds, three rows: every mean square on paper."""
    d = np.array([[1.0, 2.0, 6.0], [3.0, 2.0, 5.5]])
    # seed means 3, 3.5 -> variance 1/8, by two seeds 1/16; scores are steps of 1/2, so a mean is known to 1/6
    # row means 2, 2, 5.75 -> variance 4.6875; residuals ±.75, ±.25, ±.5 -> 2 * .875 / (1 * 2) = .875
    expected = Spread(rows=(4.6875 - 0.875 / 2) / 3, seeds=1 / 16 + (1 / 6) ** 2 / 12 / 2, freedom=1)
    assert spread_of({"t": d}, {"t": 0 * d}) == pytest.approx(expected)
    assert spread_of({"t": d}, {"t": 0 * d}, shared_rows=False) == pytest.approx(expected._replace(rows=0.0))


def test_a_difference_has_no_spread_but_its_own_pairs():
    """A third method, however wild, changes nothing for two quiet ones."""
    generator = np.random.default_rng(5)
    quiet = {name: simulate(generator, luck=0.01) for name in ("a", "b")}
    wild = simulate(generator, luck=0.5)
    assert crossed_tests({**quiet, "wild": wild}, "b")["a"] == crossed_tests(quiet, "b")["a"]


def test_p_is_never_zero():
    """Two seeds that agree on 50 rows to the last one do not make a difference certain."""
    ours, other = np.zeros((2, 50)), np.zeros((2, 50))
    ours[0, :9] = ours[1, 3:12] = 1
    assert 0.01 < crossed_tests({"a": {"t": ours}, "b": {"t": other}}, "b")["a"].p < 0.2
    every = crossed_tests({"a": {"t": other + 1}, "b": {"t": other}}, "b")["a"]
    assert 0 < every.p < 0.01
    assert p_value(1e9, Spread(1.0, 0.0, 2)) > 0


@pytest.mark.parametrize("freedom", [1, 2, 9, 200])
def test_the_error_is_students_without_rows_and_normal_without_seeds(freedom):
    assert p_value(3.0, Spread(0.0, 1.0, freedom)) == pytest.approx(2 * stats.t.sf(3, freedom), rel=1e-6)
    assert half_width(Spread(0.0, 1.0, freedom)) == pytest.approx(stats.t.isf(0.025, freedom), rel=1e-6)
    assert p_value(3.0, Spread(1.0, 0.0, freedom)) == pytest.approx(2 * stats.norm.sf(3), rel=1e-6)
    assert half_width(Spread(1.0, 0.0, freedom)) == pytest.approx(stats.norm.isf(0.025), rel=1e-6)


@pytest.mark.parametrize("own", [0.0, 0.3])
def test_the_interval_covers_the_truth(own):
    """For seeds and rows drawn anew; over the seeds alone it misses the truth once methods differ from row to row."""
    generator = np.random.default_rng(5)
    truth, repeats = 0.05, 300
    crossed = over_seeds = 0
    for _ in range(repeats):
        effects = {"ours": truth, "other": 0.0}
        methods = {k: simulate(generator, effect=e, rows=(40, 60), own=own) for k, e in effects.items()}
        found = crossed_tests(methods, "other")["ours"].interval
        crossed += found.low <= truth <= found.high
        found = paired_t(macro_by_seed(methods["ours"]), macro_by_seed(methods["other"])).interval
        over_seeds += found.low <= truth <= found.high
    assert crossed / repeats > 0.935
    if own:
        assert over_seeds / repeats < 0.93


def test_hypotheses_that_exclude_each_other_count_as_one():
    p = [0.004, 0.3, 0.006, 0.2]
    assert holm(p, ["a", "a", "b", "b"]) == [0.008, 0.4, 0.012, 0.4]
    assert holm(p, ["a", "b", "c", "d"]) == holm(p)


def test_a_large_difference_is_found():
    generator = np.random.default_rng(6)
    found = []
    for _ in range(50):
        methods = {"a": simulate(generator, effect=0.15, seeds=5), "b": simulate(generator, seeds=5)}
        found.append(crossed_tests(methods, "b")["a"].p)
    assert np.mean(np.array(found) < 0.05) > 0.9


def test_holm_by_hand_and_against_bonferroni():
    assert holm([0.01, 0.02, 0.03]) == [0.03, 0.04, 0.04]
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    p = np.random.default_rng(0).random(20)
    assert all(a <= h + 1e-9 <= min(20 * a, 1) + 1e-8 for a, h in zip(p, holm(p), strict=True))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.randoms())
def test_holm_keeps_order_and_follows_permutations(p, random):
    corrected = holm(p)
    assert sorted(corrected) == holm(sorted(p))
    order = list(range(len(p)))
    random.shuffle(order)
    assert holm([p[i] for i in order]) == [corrected[i] for i in order]
