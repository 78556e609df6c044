"""What the samples say: medians, quartiles, and ratios of competitors that were measured side by side.

All competitors of a case run once in every round, so the i-th samples of two competitors were taken seconds apart,
under the same load. Ratios are therefore formed within rounds, or from medians over the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from multiflora.bench.results import Clock, Samples

__all__ = ["Estimate", "extra_ratio", "median", "over_floor", "ratio", "spread", "total"]

_RESAMPLES = 1000


class Estimate(NamedTuple):
    """A number and the quartiles of its uncertainty."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def median(samples: Sequence[float]) -> float:
    """The median of the samples."""
    return float(np.median(np.asarray(samples)))


def total(seconds: Samples, competitor: str, clock: Clock) -> list[float]:
    """A competitor's seconds in each round, all phases together.

    Example:
        >>> total({"packed": {"forward": {"cpu": [1.0]}, "backward": {"cpu": [2.0]}}}, "packed", "cpu")
        [3.0]
    """
    return [sum(phases) for phases in zip(*(by[clock] for by in seconds[competitor].values()), strict=True)]


def spread(samples: Sequence[float]) -> Estimate:
    """Median and quartiles of the samples themselves.

    Example:
        >>> spread([1.0, 2.0, 3.0, 4.0, 5.0])
        Estimate(value=3.0, low=2.0, high=4.0)
    """
    low, middle, high = np.percentile(np.asarray(samples), [25, 50, 75])
    return Estimate(float(middle), float(low), float(high))


def ratio(ours: Sequence[float], other: Sequence[float]) -> Estimate:
    """Median over rounds of ours/other, with the quartiles over rounds.

    Example:
        >>> ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
        Estimate(value=0.5, low=0.5, high=0.5)
    """
    return spread(list(np.asarray(ours) / np.asarray(other)))


def extra_ratio(ours: Sequence[float], other: Sequence[float], base: Sequence[float]) -> Estimate:
    r"""How the time added to a base compares: :math:`\operatorname{med}(t_o - t_b) / \operatorname{med}(t_c - t_b)`.

    Differences are taken within rounds. Where what is added is small beside the base, single quotients would be mostly
    noise, so medians are divided, and the quartiles come from resampling the rounds (seeded).

    Args:
        ours: Samples of ours, one a round, in seconds.
        other: Those of the opponent, of the same rounds.
        base: Those of the frozen layer alone.

    Example:
        >>> extra_ratio([3.0, 3.0], [6.0, 6.0], [2.0, 2.0]).value
        0.25
    """
    mine, theirs = np.asarray(ours) - np.asarray(base), np.asarray(other) - np.asarray(base)
    return _resampled(lambda rows: float(np.median(mine[rows]) / np.median(theirs[rows])), len(mine))


def over_floor(ours: Sequence[float], base: Sequence[float], floor: Sequence[float]) -> Estimate:
    r"""How many floors the time added to a base is: :math:`\operatorname{med}(t_o - t_b) / \operatorname{med}(t_f)`.

    Args:
        ours: Samples of ours, one a round, in seconds.
        base: Those of the frozen layer alone.
        floor: Those of the products that ours cannot do without.

    Example:
        >>> over_floor([5.0, 5.0], [2.0, 2.0], [1.5, 1.5]).value
        2.0
    """
    mine, least = np.asarray(ours) - np.asarray(base), np.asarray(floor)
    return _resampled(lambda rows: float(np.median(mine[rows]) / np.median(least[rows])), len(mine))


def _resampled(statistic: Callable[[np.ndarray], float], rounds: int) -> Estimate:
    generator = np.random.default_rng(0)
    drawn = [statistic(generator.integers(0, rounds, rounds)) for _ in range(_RESAMPLES)]
    low, high = np.percentile(drawn, [25, 75])
    return Estimate(statistic(np.arange(rounds)), float(low), float(high))
