"""The search for a learning rate: one grid for all methods, and how it grows. Pure functions.

Neighbouring rates have about the same ratio, so the grid is even on a logarithmic scale. Some rates must be in it: the
recipe's own, and the one each method is usually trained with. Every gap between two of these is cut into equal parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from multiflora.comparison.tuning import Side, Trial, Tuning, decide
from multiflora.evaluation.results import macro_stderr
from multiflora.methods import METHODS

if TYPE_CHECKING:
    from multiflora.comparison.plan import Competitor
    from multiflora.comparison.spec import Comparison, SearchSpec

__all__ = ["first_grid", "first_rates", "grown", "search_rates", "trial_of"]

_HAS_NLL = ("acc", "acc_bytes", "nll")
_FEWEST = 3  # one rate with a neighbour on either side


def first_rates(comparison: Comparison, planned: Sequence[Competitor]) -> tuple[float, ...]:
    """The first grid of a comparison.

    It holds the recipe's rate, each method's own or usual one, and the ends asked for.
    """
    search, train = comparison.compare.learning_rate, comparison.recipe.train
    assert search is not None
    given = {train.learning_rate} if "learning_rate" in train.model_fields_set else set()
    own = {float(item.train["learning_rate"]) for item in planned if "learning_rate" in item.train}
    usual = {METHODS[item.name].learning_rate for item in planned}
    ends = {rate for rate in (search.low, search.high) if rate is not None}
    return first_grid(given | own | usual | ends, trials=search.trials, factor=search.factor)


def first_grid(required: Iterable[float], *, trials: int, factor: float) -> tuple[float, ...]:
    """Lay out the rates that every method is tried with at first.

    Args:
        required: Rates that must be in it, at least one.
        trials: Rates in all; more where the required ones need more, and at least three.
        factor: Largest ratio of two neighbours.

    Returns:
        The rates, smallest first.

    Example:
        >>> first_grid([2e-4], trials=3, factor=3)
        (6.667e-05, 0.0002, 0.0006)
        >>> first_grid([2e-4, 5e-3], trials=3, factor=3)
        (0.0002, 0.0005848, 0.00171, 0.005)
    """
    fixed = sorted(set(required))
    grid = fixed[:1]
    for low, high in pairwise(fixed):
        # the small number forgives 9 / 3 > 3 in floating point
        parts = max(1, math.ceil(math.log(high / low) / math.log(factor) - 1e-9))
        grid += [_rounded(low * (high / low) ** (k / parts)) for k in range(1, parts)] + [high]
    while len(grid) < max(trials, _FEWEST):
        # up first: trainings that are too short for their rate are more common than ones that diverge
        upwards = math.log(grid[-1] / fixed[-1]) <= math.log(fixed[0] / grid[0]) + 1e-9
        grid = list(grown(grid, ["above" if upwards else "below"], factor))
    return tuple(grid)


def grown(grid: Sequence[float], sides: Collection[Side], factor: float) -> tuple[float, ...]:
    """Add a rate on each of the sides.

    Example:
        >>> grown((1e-3, 3e-3), ["above"], 3)
        (0.001, 0.003, 0.009)
    """
    below = (_rounded(grid[0] / factor),) if "below" in sides else ()
    above = (_rounded(grid[-1] * factor),) if "above" in sides else ()
    return (*below, *grid, *above)


def search_rates(
    search: SearchSpec, grid: Sequence[float], tried: Callable[[tuple[float, ...]], Mapping[str, Sequence[Trial]]]
) -> dict[str, Tuning]:
    """Choose every method's rate from one grid, which grows while a best rate lies on its edge.

    Args:
        search: How often it may grow, and by which factor.
        grid: The rates to begin with.
        tried: Called with a grid; trains every method with every rate of it, as far as that was not done before.

    Returns:
        Method -> how well its rate is known.

    Example:
        >>> from multiflora.comparison.spec import SearchSpec
        >>> def tried(grid):
        ...     return {"lora": [Trial(rate, 0, 0.5 - abs(rate - 0.009), 1.0) for rate in grid]}
        >>> found = search_rates(SearchSpec(), (1e-3, 3e-3), tried)["lora"]
        >>> found.state, [trial.rate for trial in found.tried]
        ('tuned', [0.001, 0.003, 0.009, 0.027])
    """
    rates, most = tuple(grid), len(grid) + search.grow
    while True:
        tunings = {label: decide(trials, search.max_steps) for label, trials in tried(rates).items()}
        open_sides = {side for tuning in tunings.values() for side in tuning.open}
        wider = grown(rates, open_sides, search.factor)
        if not open_sides or len(wider) > most:
            return tunings
        rates = wider


def trial_of(cell: Mapping[str, Any]) -> Trial:
    """Read what a trial's training came to on the validation rows; neither score nor loss if it diverged."""
    tasks = cell["scores"]["tasks"]
    nats = [rows["nll"] for name, rows in cell["rows"].items() if tasks[name]["metric"] in _HAS_NLL]
    score, loss, error = cell["scores"]["macro"], None, None
    if score is not None:
        error = macro_stderr(tasks)
    if any(None in values for values in nats):
        score = error = None
    elif nats:
        loss = sum(sum(values) / len(values) for values in nats) / len(nats)
    return Trial(rate=cell["learning_rate"], seed=cell["seed"], score=score, loss=loss, error=error)


def _rounded(rate: float) -> float:
    """Four digits say all there is to say, and read well."""
    return float(f"{rate:.4g}")
