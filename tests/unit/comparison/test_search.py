"""The grid of learning rates: what must be in it is, it is even, and it grows where it is asked to."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from multiflora.comparison.search import first_grid, grown, search_rates, trial_of
from multiflora.comparison.spec import SearchSpec
from multiflora.comparison.tuning import Trial


@pytest.mark.parametrize(
    ("required", "trials", "factor", "size"),
    [
        ([2e-4], 5, 3.0, 5),
        ([2e-4], 1, 3.0, 3),  # fewer could not have a worse rate on both sides
        ([2e-4, 5e-3], 2, 3.0, 4),
        ([2e-4, 5e-3], 6, 3.0, 6),
        ([1e-3, 9e-3], 2, 3.0, 3),  # 9 is 3 times 3, whatever floating point makes of it
        ([2e-5, 2e-4, 9e-5, 3e-2], 2, 3.0, 9),
        ([1e-3, 1.1e-3], 3, 2.0, 3),
    ],
)
def test_the_grid_holds_what_it_must_without_a_wide_gap(required, trials, factor, size):
    grid = first_grid(required, trials=trials, factor=factor)
    assert set(required) <= set(grid)
    assert len(grid) == size
    assert list(grid) == sorted(set(grid))
    assert all(high / low <= factor * 1.001 for low, high in pairwise(grid))


def test_without_much_to_hold_the_grid_lies_round_it():
    grid = first_grid([2e-4], trials=5, factor=3)
    assert math.log(grid[-1] / 2e-4) == pytest.approx(math.log(2e-4 / grid[0]), rel=1e-3)


def test_the_grid_grows_on_the_sides_that_are_open():
    assert grown((1e-3, 3e-3), ["above"], 3) == (1e-3, 3e-3, 9e-3)
    assert grown((1e-3, 3e-3), ["below", "above"], 10) == (1e-4, 1e-3, 3e-3, 3e-2)
    assert grown((1e-3,), [], 3) == (1e-3,)


def cell(nll: list[float | None], metric: str = "acc", macro: float | None = 0.25) -> dict:
    scores = {"tasks": {"a": {"metric": metric, "stderr": 0.1, "score": 0.25, "group": "tasks"}}, "macro": macro}
    return {"rows": {"a": {"nll": nll}}, "scores": scores, "learning_rate": 1e-3, "seed": 4}


def test_a_trial_has_the_headline_s_score_and_the_loss_where_there_are_any():
    assert trial_of(cell([1.0, 2.0])) == Trial(1e-3, 4, 0.25, 1.5, 0.1)
    assert trial_of(cell([None, None], "verifier")) == Trial(1e-3, 4, 0.25, None, 0.1)
    assert trial_of(cell([1.0, None])) == Trial(1e-3, 4, None, None)  # diverged
    assert trial_of({**cell([]), "rows": {}, "scores": {"tasks": {}, "macro": None}}) == Trial(1e-3, 4, None, None)


@pytest.mark.parametrize(
    ("best", "grow", "rates", "states"),
    [
        ({"a": 3e-3, "b": 3e-3}, 6, 3, ["tuned", "tuned"]),  # nothing is open, nothing grows
        ({"a": 3e-3, "b": 2.7e-2}, 6, 5, ["tuned", "tuned"]),  # all methods go along
        ({"a": 3e-3, "b": 1e3}, 2, 5, ["tuned", "at the edge"]),  # a rate that no grid reaches ends it, too
        ({"a": 1e-9, "b": 1e3}, 3, 5, ["at the edge", "at the edge"]),
    ],
)
def test_the_grid_grows_while_a_best_rate_is_an_end_of_it_and_no_further_than_it_may(best, grow, rates, states):
    asked = []

    def tried(grid):
        asked.append(grid)
        off = {label: [abs(math.log(rate / peak)) for rate in grid] for label, peak in best.items()}
        return {label: [Trial(r, 0, -far, 1.0) for r, far in zip(grid, own, strict=True)] for label, own in off.items()}

    found = search_rates(SearchSpec(grow=grow, factor=3), (1e-3, 3e-3, 9e-3), tried)
    assert [tuning.state for tuning in found.values()] == states
    assert {len({trial.rate for trial in tuning.tried}) for tuning in found.values()} == {rates}
    assert len(asked[-1]) == rates <= 3 + grow
