"""What a comparison can see: the power of its tests, and how many seeds would decide."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy import optimize, special, stats

from multiflora.comparison.statistics import Array, Spread, tail

__all__ = ["CHANCE", "detectable", "power", "seeds_to_decide"]

CHANCE = 0.8
"""A comparison "can see" a difference that it finds with this probability: four times out of five."""


def power(difference: float, spread: Spread, level: float) -> float:
    """The chance that a true difference gets a p below a level, where the spread is as given.

    Args:
        difference: The true one.
        spread: The true one, taken from an estimate.
        level: What p has to be below, corrections and all.

    Example:
        >>> round(power(0.0, Spread(rows=0.0, seeds=1.0, freedom=2), 0.05), 2)
        0.05
    """
    if spread.rows + spread.seeds == 0:
        return float(difference != 0)
    return _power(difference, spread, _critical(spread, level))


@lru_cache(maxsize=1024)
def detectable(spread: Spread, level: float, chance: float = CHANCE) -> float:
    """The smallest true difference that gets a p below a level with some chance: four times out of five.

    Example:
        >>> spread = Spread(rows=0.0, seeds=1.0, freedom=9)
        >>> round(detectable(spread, 0.05), 1)
        3.1
    """
    if spread.rows + spread.seeds == 0:
        return 0.0
    critical = _critical(spread, level)
    error = float(np.sqrt(spread.rows + spread.seeds))
    # beyond this, even the largest critical value that is drawn is passed
    largest = float(critical.max()) + 10 * error
    return float(optimize.brentq(lambda d: _power(d, spread, critical) - chance, 0.0, largest))


_DRAWS = (np.arange(48) + 0.5) / 48  # the estimate of theta, as quantiles of its law


def _critical(spread: Spread, level: float) -> Array:
    """The difference that is needed for p below the level, for each estimate of theta that may come."""
    seeds = spread.seeds * stats.chi2.ppf(_DRAWS, spread.freedom) / spread.freedom
    error = np.sqrt(spread.rows + seeds)
    # between a narrower law than the normal one and a wider one than Student's, on a logarithmic scale
    low, high = 0.2 * stats.norm.isf(level / 2) * error, 2 * stats.t.isf(level / 2, spread.freedom) * error
    for _ in range(14):
        middle = np.sqrt(low * high)
        above = tail(middle, seeds, spread) > level
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    found: Array = high
    return found


def _power(difference: float, spread: Spread, critical: Array) -> float:
    error = np.sqrt(spread.rows + spread.seeds)
    return float(
        (special.ndtr((difference - critical) / error) + special.ndtr((-difference - critical) / error)).mean()
    )


@lru_cache(maxsize=1024)
def seeds_to_decide(
    difference: float, spread: Spread, level: float, *, margin: float | None = None, most: int = 100
) -> int | None:
    """How many further seeds would decide, four times out of five, were the true difference as it looks now.

    Args:
        difference: As it looks now; above 0 is better.
        spread: As it is estimated now.
        level: What p has to be below, corrections and all.
        margin: A loss that does not matter; None: only a difference decides.
        most: Seeds in all that are thought of.

    Returns:
        The number, at least 1; None where ``most`` seeds would not do, as where the rows are too few.

    Example:
        >>> seeds_to_decide(1.0, Spread(rows=0.0, seeds=1.0, freedom=2), 0.02)
        30
    """
    now = spread.freedom + 1
    # being shown to lie above -margin is a difference from -margin
    size = max(abs(difference), 0.0 if margin is None else difference + margin)

    def decided(seeds: int) -> bool:
        then = spread.with_seeds(seeds)
        return size > 0 and power(size, then, level) >= CHANCE

    low, high = now, most
    if most <= now or not decided(most):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decided(middle) else (middle, high)
    return high - now
