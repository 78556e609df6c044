"""The search for a learning rate: resumable, within its range, and it finds the bottom of a bowl."""

from __future__ import annotations

import math

import pytest

from multiflora.compare.search import best_rate, loss_of, propose

RANGE = {"low": 1e-5, "high": 1e-1, "first": 2e-4, "number": 14, "seed": 3}


def bowl(rate: float) -> float:
    """Lowest at 3e-3."""
    return (math.log10(rate) - math.log10(3e-3)) ** 2


def search(trials: int) -> list[tuple[float, float | None]]:
    found: list[tuple[float, float | None]] = []
    for _ in range(trials):
        rate = propose(found, **RANGE)
        found.append((rate, bowl(rate)))
    return found


def test_an_interrupted_search_goes_on_as_if_it_had_not_stopped():
    whole = search(8)
    assert propose(whole[:5], **RANGE) == whole[5][0]


def test_it_starts_with_the_usual_rate_and_stays_in_range():
    found = search(14)
    assert found[0][0] == 2e-4
    assert all(1e-5 <= rate <= 1e-1 for rate, _ in found)
    assert len({rate for rate, _ in found}) == 14


def test_it_finds_the_bottom():
    assert 1e-3 < best_rate(search(14)) < 1e-2


def test_a_usual_rate_outside_the_range_is_moved_into_it():
    assert propose([], **{**RANGE, "high": 1e-4}) == 1e-4


def test_a_diverged_trial_is_the_worst():
    trials = [(1e-3, 0.5), (1e-1, None), (1e-2, 0.4)]
    assert best_rate(trials) == 1e-2
    assert 1e-5 <= propose(trials, **RANGE) <= 1e-1
    assert best_rate([(1e-2, None), (1e-3, None)]) == 1e-3


def cell(nll: list[float | None], metric: str = "acc", macro: float | None = 0.25) -> dict:
    return {"rows": {"a": {"nll": nll}}, "scores": {"tasks": {"a": {"metric": metric}}, "macro": macro}}


def test_a_trial_is_judged_by_nats_or_else_by_score():
    assert loss_of(cell([1.0, 2.0])) == 1.5
    assert loss_of(cell([None, None], "verifier")) == pytest.approx(0.75)
    assert loss_of(cell([1.0, None])) is None  # diverged
    assert loss_of(cell([None], "verifier", None)) is None
