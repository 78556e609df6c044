r"""What a few seeds and a few hundred rows can tell. Pure functions on arrays; scipy has the distributions.

Two methods are trained with the same S seeds and scored on the same rows, so everything is paired: all that is looked
at is :math:`d_{tsi}`, the difference of their scores on row i of task t after training with seed s. Its mean over
rows, then tasks, is :math:`d_s`, one number for each seed; the macro difference :math:`\bar d` is their mean. Its
variance, for seeds and rows drawn anew, has two parts,

.. math:: \operatorname{Var}(\bar d) = A + \theta, \qquad
    \hat\theta = \frac{1}{S}\,\frac{\sum_s (d_s - \bar d)^2}{S - 1}, \qquad
    \hat A = \max(v_\text{rows} - v_\text{both},\, 0)

(the analysis of readers and cases in diagnostic trials, Dorfman, Berbaum and Metz 1992, with seeds for readers and
rows for cases). A is what the rows bring that every training shares; theta is the rest, and it is the pair's own:
methods differ in their spread over seeds by a factor of seven, so nothing is pooled over methods. Where each seed has
rows of its own, the rows' chance is in the spread of the :math:`d_s` already, A is 0 and all of this is the paired
t-test.

theta is known from S - 1 degrees of freedom only, A from hundreds of rows. The error is therefore that of Behrens and
Fisher with one variance known: given the data, theta is :math:`\hat\theta (S-1) / \chi^2_{S-1}`, and

.. math:: p = \mathrm{E}_\theta\; 2\,\Phi\!\left(-|\bar d| / \sqrt{A + \theta}\right)

which is Student's t for A = 0 and the normal law for theta = 0, and never claims more often than its level in between.
For intervals, which shall be neither too short nor too long, theta is weighted by :math:`1 + \lambda A/\theta`
(lambda = 1 is the prior that matches probabilities to second order, Ghosh and Kim 2001, Canadian J. Statistics 29:5-17;
for few seeds a smaller one is right). ``tools/simulate_verdict.py`` measures both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats

__all__ = [
    "CLAIM",
    "LEVEL",
    "Difference",
    "Interval",
    "Spread",
    "crossed_tests",
    "half_width",
    "holm",
    "macro_by_seed",
    "p_value",
    "paired_t",
    "spread_of",
    "t_interval",
    "tail",
]

LEVEL = 0.95
"""Confidence of every interval."""

CLAIM = 0.02
"""A difference is claimed where its corrected p is below this: among a hundred comparisons of equal methods two find a
winner on average, and rarely more than five do. (At 0.05 every other hundred would have more than five.)"""

Array: TypeAlias = npt.NDArray[np.float64]
Outcomes: TypeAlias = Mapping[str, Array]
"""Task -> one number for each seed and row, (seeds, rows)."""


class Interval(NamedTuple):
    """A mean and its confidence interval; the ends are None where one value is all there is."""

    mean: float
    low: float | None
    high: float | None


class Spread(NamedTuple):
    """The variance of a difference, in its two parts; see the module's formula."""

    rows: float
    """A: what the rows bring that all seeds share. More seeds do not make it smaller."""
    seeds: float
    """theta, estimated: what the seeds bring, divided by their number."""
    freedom: int
    """Degrees of freedom of ``seeds``: their number less one."""

    def with_seeds(self, number: int) -> Spread:
        """What it would be with another number of seeds."""
        return Spread(self.rows, self.seeds * (self.freedom + 1) / number, number - 1)


class Difference(NamedTuple):
    """How far two methods are apart, and the chance of that much or more if they were not."""

    interval: Interval
    p: float | None
    """None where it cannot be known: from one seed."""
    spread: Spread | None = None
    """What the interval and p are made of; None from one seed."""


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
    if np.ptp(differences) == 0:  # no spread, no t: where they are not equal, nothing can be said of how surely
        return Difference(interval, 1.0 if differences[0] == 0 else None)
    return Difference(interval, float(stats.ttest_1samp(differences, 0.0).pvalue))


def crossed_tests(
    methods: Mapping[str, Outcomes], reference: str, level: float = LEVEL, *, shared_rows: bool = True
) -> dict[str, Difference]:
    """Test every method against one of them, over seeds and rows at once; see the module's formula.

    Args:
        methods: Method -> its outcomes; the same tasks, seeds and rows for all.
        reference: The method that the others are tested against.
        level: Of the intervals.
        shared_rows: Whether all seeds are scored on the same rows, or each on rows of its own.

    Returns:
        Method -> its difference to the reference (theirs taken off). p and interval are missing from a single seed:
        however many rows there are, one training each cannot tell two methods from their luck.
    """
    other = methods[reference]
    return {
        name: _crossed(outcomes, other, level, shared_rows) for name, outcomes in methods.items() if name != reference
    }


def _crossed(ours: Outcomes, other: Outcomes, level: float, shared_rows: bool) -> Difference:
    """One method's difference to another."""
    mean = float((macro_by_seed(ours) - macro_by_seed(other)).mean())
    spread = spread_of(ours, other, shared_rows=shared_rows)
    if spread is None:
        return Difference(Interval(mean, None, None), None)
    if all(np.array_equal(ours[task], other[task]) for task in ours):
        return Difference(Interval(0.0, 0.0, 0.0), 1.0, spread)
    half = half_width(spread, level)
    return Difference(Interval(mean, mean - half, mean + half), p_value(mean, spread), spread)


def spread_of(ours: Outcomes, other: Outcomes, *, shared_rows: bool = True) -> Spread | None:
    """Estimate the variance of two methods' macro difference, in its two parts; None from a single seed.

    A score that is a share of n rows is known to a step of 1/n only, so the seeds' part is never less than what
    rounding to that step brings (step²/12): two seeds that happen to agree do not make a difference certain.

    Args:
        ours: Outcomes of one method.
        other: Those of the other, with the same tasks, seeds and rows.
        shared_rows: Whether all seeds are scored on the same rows.
    """
    by_task = {task: ours[task] - other[task] for task in ours}
    tasks, seeds = len(by_task), len(next(iter(by_task.values())))
    if seeds < 2:
        return None
    by_seed = np.mean([d.mean(1) for d in by_task.values()], axis=0)
    rows = 0.0
    for d in by_task.values():
        n = d.shape[1]
        if shared_rows and n > 1:
            left = d - d.mean(0) - d.mean(1, keepdims=True) + d.mean()
            both = float((left**2).sum()) / ((seeds - 1) * (n - 1)) / seeds
            rows += (float(d.mean(0).var(ddof=1)) - both) / n / tasks**2
    step = max(_step(ours[task], other[task]) / ours[task].shape[1] for task in ours) / tasks
    return Spread(max(rows, 0.0), float(by_seed.var(ddof=1) + step**2 / 12) / seeds, seeds - 1)


def _step(*values: Array) -> float:
    """The smallest step between two scores of a row: 1 where they are right or wrong, next to nothing for nats."""
    every = np.unique(np.concatenate([v.ravel() for v in values]))
    if len(every) > 1:
        return float(np.diff(every).min())
    return float(every[0] in (0, 1))  # every answer was right, or every one wrong


def p_value(difference: float, spread: Spread) -> float:
    """The chance of a difference as far from 0 as this or farther, were there none; see the module's formula.

    Example:
        >>> round(p_value(2.0, Spread(rows=0.0, seeds=1.0, freedom=4)), 4)  # Student's t
        0.1161
    """
    if spread.rows + spread.seeds == 0:
        return float(difference == 0) or float(np.finfo(np.float64).tiny)
    p = float(tail(np.array(abs(difference)), np.array(spread.seeds), spread))
    return max(p, float(np.finfo(np.float64).tiny))  # a computer runs out of digits before chance runs out


def half_width(spread: Spread, level: float = LEVEL) -> float:
    """Half the width of a difference's interval.

    Example:
        >>> round(half_width(Spread(rows=1.0, seeds=0.0, freedom=4)), 2)  # rows alone: the normal law
        1.96
    """
    if spread.rows + spread.seeds == 0:
        return 0.0
    # chosen so that intervals hold the truth in .94 to .97 from two seeds on
    weight = min(max((spread.freedom - 1) / 10, 0.02), 1.0)
    largest = 2 * float(stats.t.isf((1 - level) / 2, spread.freedom)) * np.sqrt(spread.rows + spread.seeds)
    seeds = np.array(spread.seeds)
    return float(optimize.brentq(lambda half: tail(np.array(half), seeds, spread, weight) - (1 - level), 0.0, largest))


def tail(difference: Array, seeds: Array, spread: Spread, weight: float = 0.0) -> Array:
    """p of many differences, each with an estimate of theta of its own: an average over what theta may be.

    Args:
        difference: Their sizes.
        seeds: Their estimates of theta, of the same shape.
        spread: The rows' part, and the degrees of freedom.
        weight: lambda, see the module's formula.
    """
    chi2, share = _chi2(spread.freedom)
    theta = seeds[..., None] * (spread.freedom / chi2)
    z = difference[..., None] / np.sqrt(spread.rows + theta)
    if not weight or not spread.rows:
        plain: Array = 2 * (special.ndtr(-z) @ share)
        return plain
    # where seeds bring nothing at all, the rows' law is all there is, whatever the weights
    share = share * (1 + weight * spread.rows / np.maximum(theta, np.finfo(np.float64).tiny ** 0.5))
    weighted: Array = 2 * (special.ndtr(-z) * share).sum(-1) / share.sum(-1)
    return weighted


@lru_cache(maxsize=256)
def _chi2(freedom: int) -> tuple[Array, Array]:
    """Values of a chi-square variable and their shares, evenly spaced in its logarithm, far into the left tail."""
    width = 12 * np.sqrt(2 / freedom)
    logs = np.log(freedom) + np.linspace(-70 / freedom - width, np.log1p(80 / freedom + width), 128)
    density = freedom * logs / 2 - np.exp(logs) / 2
    share = np.exp(density - density.max())
    return np.exp(logs), share / share.sum()


def holm(p_values: Sequence[float], owners: Sequence[object] | None = None) -> list[float]:
    r"""Correct p values for their number, so that the chance of *any* false claim stays at the level (Holm 1979).

    .. math:: \tilde p_{(i)} = \max_{j \le i} \min(1,\, m_j\, p_{(j)})

    with :math:`m_j` the number of hypotheses that can be true together among those from the j-th on (Shaffer 1986):
    all of them, or one for each owner where an owner's exclude each other, as "the difference is 0" and "it is -1"
    do.

    Args:
        p_values: One for each hypothesis.
        owners: Whose each is; None: every one is its own.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
        >>> holm([0.01, 0.04, 0.03], ["a", "a", "b"])
        [0.02, 0.06, 0.06]
    """
    owners = range(len(p_values)) if owners is None else owners
    order = np.argsort(p_values)
    left = [len({owners[k] for k in order[place:]}) for place in range(len(order))]
    scaled = np.asarray(p_values, dtype=np.float64)[order] * np.array(left, dtype=np.float64)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    # rounding never makes a p 0
    return [float(f"{p:.12g}") for p in corrected]


def macro_by_seed(outcomes: Outcomes) -> Array:
    """Each seed's mean over tasks of the mean over rows, (seeds,)."""
    by_seed: Array = np.mean([rows.mean(1) for rows in outcomes.values()], axis=0)
    return by_seed
