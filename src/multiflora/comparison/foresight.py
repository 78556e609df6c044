"""What a plan can see and what it costs, before anything is trained."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from multiflora.comparison.looks import levels
from multiflora.comparison.power import detectable
from multiflora.comparison.statistics import Spread
from multiflora.comparison.words import duration

if TYPE_CHECKING:
    from multiflora.comparison.plan import Competitor
    from multiflora.comparison.spec import Comparison

__all__ = ["LUCK", "Foresight", "expected_spread", "foresee"]

LUCK = (0.009, 0.025, 0.065)
"""A quiet, a middling and a restless method: standard deviations of accuracy over seeds, from published trainings."""

# of two methods' answers to a row: the variance that each training brings, and the one that all share
_FLIPS, _OWN = 0.15, 0.05
_ROWS = 500  # of a task whose number of test rows nobody has set


class Foresight(NamedTuple):
    """What a plan can see and what it costs."""

    seeds: int
    """Of the last look."""
    differences: tuple[float, ...]
    """True differences of the macro score that would be found four times out of five, for each of `LUCK`."""
    trainings: int
    """Trainings in all, those of the search among them."""
    seconds: float | None
    """What they take; None where neither a finished training nor the model tells."""
    measured: bool
    """Whether the time is that of finished trainings, or a rough guess from the machine's speed."""

    def told(self) -> str:
        """A sentence or two."""
        ends = [f"{100 * value:.1f}" for value in self.differences]
        time_ = (
            ""
            if self.seconds is None
            else f" {self.trainings} trainings take about {duration(self.seconds)}"
            + (", as long as those that are finished." if self.measured else "; a rough guess, scoring comes on top.")
        )
        if self.seeds < 2:
            return f"One seed shows nothing, however many rows are scored.{time_}"
        return (
            f"With {self.seeds} seeds, a true difference of {ends[0]} points would be found four times out of five "
            f"where scores spread by {100 * LUCK[0]:.1f} points from seed to seed, {ends[1]} points where by "
            f"{100 * LUCK[1]:.1f}, {ends[2]} points where by {100 * LUCK[2]:.1f}.{time_}"
        )


def expected_spread(rows: Sequence[int], seeds: int, luck: float) -> Spread:
    """The variance of two methods' macro difference, as it may be expected.

    Args:
        rows: Test rows of each task.
        seeds: Of each method.
        luck: Standard deviation of each method's macro score over seeds.

    Example:
        >>> expected_spread([200], 4, 0.02)
        Spread(rows=0.00025, seeds=0.0003875, freedom=3)
    """
    share = sum(1 / n for n in rows) / len(rows) ** 2
    return Spread(round(_OWN * share, 12), round((2 * luck**2 + _FLIPS * share) / seeds, 12), seeds - 1)


def foresee(comparison: Comparison, planned: Sequence[Competitor]) -> Foresight:
    """Say what a plan can see at its last look, and what it costs until then.

    Args:
        comparison: The comparison.
        planned: Its competitors.
    """
    spec, recipe = comparison.compare, comparison.recipe
    plan = spec.looks()
    seeds, tests = plan[-1], max(2 * (len(planned) - 1), 1)
    rows = [recipe.evaluate.limit or _ROWS for _ in recipe.tasks]
    level = levels(plan)[seeds] / tests
    seen = tuple(detectable(expected_spread(rows, seeds, luck), level) for luck in LUCK) if seeds > 1 else ()
    search = spec.learning_rate
    trainings = len(planned) * (seeds + (search.trials if search else 0))
    each, measured = _finished(comparison), True
    if each is None:
        each, measured = _guessed(comparison), False
    return Foresight(seeds, seen, trainings, each * trainings, measured)


def _finished(comparison: Comparison) -> float | None:
    """Seconds of a training and its scoring, the mean of those that are finished."""
    found = []
    for path in sorted((comparison.recipe.output / "cells").glob("*-seed*.json")):
        seconds = json.loads(path.read_text("utf-8"))["seconds"]
        if seconds:
            found.append(sum(seconds.values()))
    return sum(found) / len(found) if found else None


def _guessed(comparison: Comparison) -> float:
    """Seconds of a training, from its operations and the speed of this machine's matrix product.

    A frozen weight takes part in a forward and a backward product, two operations each for every token.
    """
    from multiflora.base_model import empty_model, load_config

    recipe = comparison.recipe
    model = empty_model(load_config(recipe.model), remote=recipe.model.trust_remote_code)
    parameters = sum(weight.numel() for weight in model.parameters())
    train = recipe.train
    # short examples are the rule: half of what a batch may hold
    tokens = train.batch_size * train.gradient_accumulation * train.max_length / 2
    steps = train.max_steps or _ROWS
    # a step takes some time whatever the size
    return float(steps * max(4 * parameters * tokens / _speed(), 0.05))


def _speed() -> float:
    """Operations a second in a product of two matrices, half of which a training reaches."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 4096 if device == "cuda" else 512
    one = torch.ones(size, size, device=device)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        float((one @ one)[0, 0])
        times.append(time.perf_counter() - start)
    return float(2 * size**3 / np.median(times) / 2)
