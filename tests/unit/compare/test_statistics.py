"""Statistics against scipy, against data with a known answer, and against methods that do not differ."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from multiflora.compare.statistics import (
    bootstrap_differences,
    crossed_tests,
    holm,
    macro_by_seed,
    paired_t,
    rank_methods,
    resample,
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
    assert against_zero(np.ones((1, 50))) == ((1.0, None, None), None)
    assert paired_t([0.5], [0.4]).p is None


def test_paired_t_is_scipys():
    ours, other = [0.61, 0.64, 0.66, 0.59], [0.60, 0.61, 0.61, 0.60]
    assert paired_t(ours, other).p == pytest.approx(stats.ttest_rel(ours, other).pvalue)
    interval = stats.ttest_rel(ours, other).confidence_interval()
    assert paired_t(ours, other).interval[1:] == pytest.approx((interval.low, interval.high))


def test_equal_outcomes_are_no_difference():
    same = np.random.default_rng(0).normal(size=(3, 40))
    assert paired_t(same[:, 0], same[:, 0]) == ((0.0, 0.0, 0.0), 1.0)
    assert crossed_tests({"a": {"t": same}, "b": {"t": same}}, "b")["a"] == ((0.0, 0.0, 0.0), 1.0)


def test_two_methods_whose_rows_do_not_differ_get_the_paired_t_test_over_seeds():
    d = np.random.default_rng(3).normal(0, 0.2, (6, 1)) + np.zeros((6, 40))
    assert against_zero(d).p == pytest.approx(paired_t(d[:, 0], np.zeros(6)).p)
    assert against_zero(d).interval == pytest.approx(paired_t(d[:, 0], np.zeros(6)).interval)


def test_many_methods_share_their_spread_over_seeds():
    """Without rows of their own: the t tests of scipy's two-way analysis, by hand from its mean square."""
    table = np.random.default_rng(4).normal(0, 1, (4, 3))
    found = crossed_tests({str(m): {"t": table[m][:, None]} for m in range(4)}, "0")
    left = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    mean_square = (left**2).sum() / 6
    for m in range(1, 4):
        own = (table[m] - table[0]).var(ddof=1) / 3
        t = (table[m] - table[0]).mean() / np.sqrt(max(2 * mean_square / 3, own))
        assert found[str(m)].p == pytest.approx(2 * stats.t.sf(abs(t), 6))


def test_trainings_without_luck_leave_the_variance_of_the_rows():
    d = np.random.default_rng(4).normal(0.05, 1.0, 400)
    found = against_zero(np.tile(d, (3, 1)))
    low, high = stats.t.interval(0.95, 2, d.mean(), stats.sem(d))  # the degrees of freedom stay those of the seeds
    assert found.interval[1:] == pytest.approx((low, high))


def test_crossed_variance_by_hand():
    """Two seeds, three rows: every mean square on paper."""
    d = np.array([[1.0, 2.0, 6.0], [3.0, 2.0, 4.0]])
    # seed means 3, 3 -> 0; row means 2, 2, 5 -> variance 3; residuals ±1, 0, ∓1 -> 4 / (1 · 2) = 2
    variance = 0 + (3 / 3 - 2 / (2 * 3))
    half = stats.t.ppf(0.975, 1) * np.sqrt(variance)
    assert against_zero(d).interval == pytest.approx((3.0, 3.0 - half, 3.0 + half))


@pytest.mark.parametrize("own", [0.0, 0.3])
def test_the_interval_covers_the_truth(own):
    """For seeds and rows drawn anew; over the seeds alone it misses the truth once methods differ from row to row."""
    generator = np.random.default_rng(5)
    truth, repeats = 0.05, 300
    crossed = over_seeds = 0
    for _ in range(repeats):
        effects = {"ours": truth, "other": 0.0, "third": 0.1, "fourth": 0.0}
        methods = {k: simulate(generator, effect=e, rows=(40, 60), own=own) for k, e in effects.items()}
        found = crossed_tests(methods, "other")["ours"].interval
        crossed += found.low <= truth <= found.high
        found = paired_t(macro_by_seed(methods["ours"]), macro_by_seed(methods["other"])).interval
        over_seeds += found.low <= truth <= found.high
    assert crossed / repeats > 0.935
    if own:
        assert over_seeds / repeats < 0.93


def test_a_large_difference_is_found():
    generator = np.random.default_rng(6)
    found = []
    for _ in range(50):
        methods = {"a": simulate(generator, effect=0.15), "b": simulate(generator), "c": simulate(generator)}
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


def test_ranking_of_clear_and_of_equal_methods():
    generator = np.random.default_rng(7)
    methods = {"good": simulate(generator, effect=0.3), "a": simulate(generator), "b": simulate(generator)}
    totals = resample(methods)
    ranks = rank_methods(methods, totals)
    assert ranks["good"].rank == ranks["good"].high == 1
    assert ranks["good"].best > 0.99
    assert (min(ranks["a"].low, ranks["b"].low), max(ranks["a"].high, ranks["b"].high)) == (2, 3)
    assert sum(rank.best for rank in ranks.values()) == pytest.approx(1)
    assert rank_methods(methods, totals, lower_is_better=True)["good"].rank == 3


def test_methods_that_are_the_same_share_the_first_rank():
    one = {"a": simulate(np.random.default_rng(8))}
    methods = {"a": one["a"], "b": one["a"]}
    assert rank_methods(methods, resample(methods)) == {"a": (1, 1, 1, 0.5), "b": (1, 1, 1, 0.5)}


def test_bootstrap_of_rows_alone_is_scipys():
    d = np.random.default_rng(9).normal(0.1, 1.0, 300)
    methods = {"ours": {"t": np.tile(d, (4, 1))}, "other": {"t": np.zeros((4, 300))}}
    found = bootstrap_differences(methods, resample(methods), "other")["ours"]
    theirs = stats.bootstrap((d,), np.mean, method="percentile", rng=0).confidence_interval
    assert found == pytest.approx((d.mean(), theirs.low, theirs.high), abs=0.01)


def test_bootstrap_is_repeatable():
    methods = {"a": simulate(np.random.default_rng(8)), "b": simulate(np.random.default_rng(9))}
    assert np.array_equal(resample(methods), resample(methods))
