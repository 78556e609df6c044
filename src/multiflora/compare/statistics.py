r"""What a few seeds and a few hundred rows can tell. Pure functions on arrays; scipy has the distributions.

A comparison has two sources of chance: which seed a training got, and which rows are in the test set. All M methods are
trained with the same S seeds and scored on the same rows, so everything is paired. With :math:`d_{tsi}` the difference
of two methods on row i of task t after training with seed s, the macro difference is

.. math:: \bar d = \frac1T \sum_t \frac1{S n_t} \sum_{s,i} d_{tsi}

and its variance, for seeds and rows drawn anew, is the sum of what the seeds and what the rows contribute,

.. math:: \widehat{\operatorname{Var}}(\bar d) = v_\text{seeds} + \max(v_\text{rows} - v_\text{both},\, 0)

as in the analysis of readers and cases in diagnostic trials (Dorfman, Berbaum and Metz 1992; Hillis 2007, Statistics in
Medicine 26:596-619), with seeds for readers and rows for cases. A t-test over the seeds' means alone would speak of
this test set only, a test over rows alone of these trainings only.

Three seeds tell little of their own spread. So :math:`v_\text{seeds}` is taken from all methods together, as in a
randomised block design: :math:`2/S` times the mean square that is left of the table methods x seeds without the means
of its rows and columns; where two methods' own differences spread more than that, theirs is taken. The t statistic has
that mean square's (M-1)(S-1) degrees of freedom. Hillis adds to them where rows dominate; with three seeds, that found
winners among equals in 16 of 100 simulated comparisons, so it is not done here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import stats

__all__ = [
    "CLAIM",
    "LEVEL",
    "Difference",
    "Interval",
    "Rank",
    "bootstrap_differences",
    "crossed_tests",
    "holm",
    "macro_by_seed",
    "paired_t",
    "rank_methods",
    "resample",
    "t_interval",
]

LEVEL = 0.95
"""Confidence of every interval."""

CLAIM = 0.02
"""A difference is claimed where its corrected p is below this: among a hundred comparisons of equal methods two find a
winner on average, and rarely more than five do. (At 0.05 every other hundred would have more than five.)"""

_RESAMPLES = 2000

Array: TypeAlias = npt.NDArray[np.float64]
Outcomes: TypeAlias = Mapping[str, Array]
"""Task -> one number for each seed and row, (seeds, rows)."""


class Interval(NamedTuple):
    """A mean and its confidence interval; the ends are None where one value is all there is."""

    mean: float
    low: float | None
    high: float | None


class Difference(NamedTuple):
    """How far two methods are apart, and the chance of that much or more if they were not."""

    interval: Interval
    p: float | None
    """None where it cannot be known: from one seed."""


class Rank(NamedTuple):
    """Where a method stands among all, and how sure that is."""

    rank: int
    """1 is the best."""
    low: int
    """Best rank in the middle 95 % of resamples."""
    high: int
    """Worst rank there."""
    best: float
    """Share of resamples in which it is the best."""


def t_interval(values: Sequence[float] | Array, level: float = LEVEL) -> Interval:
    r"""The mean of independent values with its t interval, :math:`\bar x \pm t_{n-1}\, s/\sqrt n`.

    Example:
        >>> mean, low, high = t_interval([1.0, 2.0, 3.0])
        >>> round(low, 3), round(high, 3)
        (-0.484, 4.484)
    """
    sample = np.asarray(values, dtype=np.float64)
    mean = float(sample.mean())
    if len(sample) < 2:
        return Interval(mean, None, None)
    half = float(stats.t.ppf((1 + level) / 2, len(sample) - 1) * sample.std(ddof=1) / np.sqrt(len(sample)))
    return Interval(mean, mean - half, mean + half)


def paired_t(ours: Sequence[float] | Array, other: Sequence[float] | Array, level: float = LEVEL) -> Difference:
    """The paired t-test over seeds: speaks of new seeds, on these very rows.

    Args:
        ours: One value for each seed.
        other: Those of the other method, in the same order of seeds.
        level: Of the interval.

    Example:
        >>> round(paired_t([0.5, 0.6, 0.8], [0.4, 0.4, 0.5]).p, 3)
        0.074
    """
    differences = np.asarray(ours, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    interval = t_interval(differences, level)
    if len(differences) < 2:
        return Difference(interval, None)
    if np.ptp(differences) == 0:  # no spread, no t: equal or not is all there is to say
        return Difference(interval, 1.0 if differences[0] == 0 else 0.0)
    return Difference(interval, float(stats.ttest_1samp(differences, 0.0).pvalue))


def crossed_tests(methods: Mapping[str, Outcomes], reference: str, level: float = LEVEL) -> dict[str, Difference]:
    """Test every method against one of them, over seeds and rows at once; see the module's formula.

    Args:
        methods: Method -> its outcomes; the same tasks, seeds and rows for all.
        reference: The method that the others are tested against.
        level: Of the intervals.

    Returns:
        Method -> its difference to the reference (theirs taken off). p and interval are missing from a single seed:
        however many rows there are, one training each cannot tell two methods from their luck.
    """
    means = np.stack([macro_by_seed(outcomes) for outcomes in methods.values()])
    count, seeds = means.shape
    left = means - means.mean(1, keepdims=True) - means.mean(0) + means.mean()
    freedom = (count - 1) * (seeds - 1)
    shared = 2 / seeds * float((left**2).sum()) / freedom if freedom else 0.0
    return {
        name: _crossed(outcomes, methods[reference], shared, freedom, level)
        for name, outcomes in methods.items()
        if name != reference
    }


def _crossed(ours: Outcomes, other: Outcomes, shared: float, freedom: int, level: float) -> Difference:
    """One difference, given the variance that the seeds bring to any difference."""
    by_task = [ours[task] - other[task] for task in ours]
    tasks, seeds = len(by_task), len(by_task[0])
    by_seed = np.mean([d.mean(1) for d in by_task], axis=0)
    mean = float(by_seed.mean())
    if seeds < 2:
        return Difference(Interval(mean, None, None), None)
    from_rows = from_both = 0.0
    for d in by_task:
        rows = d.shape[1]
        if rows > 1:
            residual = d - d.mean(0) - d.mean(1, keepdims=True) + d.mean()
            from_rows += float(d.mean(0).var(ddof=1)) / rows / tasks**2
            from_both += float((residual**2).sum()) / ((seeds - 1) * (rows - 1)) / (seeds * rows) / tasks**2
    from_seeds = max(shared, float(by_seed.var(ddof=1)) / seeds)
    if mean == 0 and not any(d.any() for d in by_task):
        return Difference(Interval(0.0, 0.0, 0.0), 1.0)
    error = float(np.sqrt(from_seeds + max(from_rows - from_both, 0.0)))
    half = float(stats.t.ppf((1 + level) / 2, freedom)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, freedom)) if error else float(mean == 0)
    return Difference(Interval(mean, mean - half, mean + half), p)


def holm(p_values: Sequence[float]) -> list[float]:
    r"""Correct p values for their number, so that the chance of *any* false claim stays at the level (Holm 1979).

    .. math:: \tilde p_{(i)} = \max_{j \le i} \min(1,\, (m - j + 1)\, p_{(j)})

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values)
    scaled = np.asarray(p_values, dtype=np.float64)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [round(float(p), 12) for p in corrected]


def macro_by_seed(outcomes: Outcomes) -> Array:
    """Each seed's mean over tasks of the mean over rows, (seeds,)."""
    by_seed: Array = np.mean([rows.mean(1) for rows in outcomes.values()], axis=0)
    return by_seed


def resample(methods: Mapping[str, Outcomes], seed: int = 0) -> Array:
    """Macro outcomes for seeds and rows drawn anew, (draws, methods).

    Seeds and rows are drawn with replacement, the same draw for every method, as they are crossed and paired (Owen
    2007, The pigeonhole bootstrap, Annals of Applied Statistics 1:386-411: it errs towards too much uncertainty).

    Args:
        methods: Method -> its outcomes; the same tasks, seeds and rows for all.
        seed: Of the draws.
    """
    generator = np.random.default_rng(seed)
    names = list(methods)
    shapes = {task: rows.shape for task, rows in methods[names[0]].items()}
    seeds = next(iter(shapes.values()))[0]
    draws = generator.multinomial(seeds, np.full(seeds, 1 / seeds), _RESAMPLES) / seeds
    totals = np.zeros((_RESAMPLES, len(names)))
    for task, (_, rows) in shapes.items():
        weights = generator.multinomial(rows, np.full(rows, 1 / rows), _RESAMPLES) / rows
        for k, name in enumerate(names):
            totals[:, k] += ((draws @ methods[name][task]) * weights).sum(1) / len(shapes)
    return totals


def rank_methods(methods: Mapping[str, Outcomes], totals: Array, *, lower_is_better: bool = False) -> dict[str, Rank]:
    """Rank methods by macro outcome, with the ranking's uncertainty.

    Args:
        methods: Method -> its outcomes.
        totals: Their `resample`. From one seed it speaks of the rows alone.
        lower_is_better: For nats.
    """
    observed = np.array([macro_by_seed(outcomes).mean() for outcomes in methods.values()])
    sign = 1 if lower_is_better else -1
    ranks = stats.rankdata(sign * totals, axis=1, method="min")
    low, high = np.percentile(ranks, _edges(), axis=0, method="nearest").astype(int)
    own = stats.rankdata(sign * observed, method="min").astype(int)
    # where methods tie for the first place, they share it
    firsts = ranks == 1
    best = (firsts / firsts.sum(1, keepdims=True)).mean(0)
    return {
        name: Rank(int(own[k]), int(low[k]), int(high[k]), round(float(best[k]), 6)) for k, name in enumerate(methods)
    }


def bootstrap_differences(methods: Mapping[str, Outcomes], totals: Array, reference: str) -> dict[str, Interval]:
    """The percentile interval of every method's difference to one of them: a second opinion, without a normal law.

    With three seeds it is too narrow where seeds matter most, so no claim rests on it.

    Args:
        methods: Method -> its outcomes.
        totals: Their `resample`.
        reference: The method whose outcome is taken off.
    """
    names = list(methods)
    theirs, observed = names.index(reference), [float(macro_by_seed(methods[name]).mean()) for name in names]
    found = {}
    for k, name in enumerate(names):
        if k != theirs:
            low, high = np.percentile(totals[:, k] - totals[:, theirs], _edges())
            found[name] = Interval(observed[k] - observed[theirs], float(low), float(high))
    return found


def _edges() -> list[float]:
    return [100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2]
