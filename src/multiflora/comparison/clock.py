"""Equal training time: every method gets as many steps as it takes in the time of the baseline's training.

The ranks are those of equal parameters; what is left to differ is the time of a step. It is measured before anything
else, by short trainings on the same examples, in turns, so that a machine that slows down does so for all. All cells
then have fixed steps, so that a comparison that is stopped goes on with the same ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from multiflora.comparison.plan import Cell, Competitor, clock_cell
from multiflora.comparison.spec import Comparison

__all__ = ["clock_cells", "in_time"]

_ROUNDS = 3
_STEPS = 12  # of a round; the first pays for what later ones find ready


def clock_cells(comparison: Comparison, planned: Sequence[Competitor]) -> list[Cell]:
    """The short trainings that measure every method's speed, round by round; none where time is not what is equal."""
    if comparison.compare.budget.equal != "time":
        return []
    return [clock_cell(comparison, item, number, _STEPS) for number in range(_ROUNDS) for item in planned]


def in_time(
    comparison: Comparison, planned: Sequence[Competitor], found: Sequence[Mapping[str, Any]]
) -> list[Competitor]:
    """Give every method its steps.

    Args:
        comparison: The comparison.
        planned: Its competitors.
        found: The cells of `clock_cells`, finished.

    Returns:
        The competitors, with ``max_steps`` in ``train``: those of the recipe times a method's speed over that of the
        method that sets the time.
    """
    if comparison.compare.budget.equal != "time":
        return list(planned)
    speed = {
        item.label: statistics.median(v for cell in found if cell["label"] == item.label for v in cell["speeds"])
        for item in planned
    }
    first = next(i for i in planned if i.label == (comparison.compare.budget.of or comparison.compare.reference()))
    steps = {**comparison.recipe.train.model_dump(), **first.train}["max_steps"]
    return [
        replace(item, train={**item.train, "max_steps": max(1, round(steps * speed[item.label] / speed[first.label]))})
        for item in planned
    ]
