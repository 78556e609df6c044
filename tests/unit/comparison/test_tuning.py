"""The verdict's ground: the best rate lies between worse ones, or the words say that it does not."""

from __future__ import annotations

import pytest

from multiflora.comparison.tuning import Trial, decide, missing, waits_for

COMMAND = "multiflora compare out/comparison.yaml"


def tried(*scores: float | None, loss: float | None = 1.0) -> list[Trial]:
    """One trial a rate, at 1e-3, 1e-2, 1e-1, ... None is a training that diverged."""
    return [Trial(10.0 ** (k - 3), 0, score, None if score is None else loss) for k, score in enumerate(scores)]


@pytest.mark.parametrize(
    ("scores", "state", "chosen", "open_sides"),
    [
        ((0.3, 0.5, 0.4), "tuned", 1e-2, ()),
        ((0.3, 0.4, 0.5), "at the edge", 1e-1, ("above",)),
        ((0.5, 0.4, 0.3), "at the edge", 1e-3, ("below",)),
        ((0.5, 0.5, 0.3), "at the edge", 1e-3, ("below",)),  # as good is not worse
        ((0.3, 0.5, None), "tuned", 1e-2, ()),  # diverged is worse
        ((None, 0.5, 0.4), "tuned", 1e-2, ()),
        ((None, None), "at the edge", 1e-3, ("below",)),  # a larger one diverges all the more
        ((0.5,), "not tuned", 1e-3, ("below", "above")),
    ],
)
def test_tuned_is_a_rate_with_a_worse_one_on_both_sides(scores, state, chosen, open_sides):
    found = decide(tried(*scores))
    assert (found.state, found.chosen, found.open) == (state, pytest.approx(chosen), open_sides)


def test_equal_scores_are_told_apart_by_the_loss():
    trials = [Trial(1e-3, 0, 0.5, 2.0), Trial(1e-2, 0, 0.5, 1.0), Trial(1e-1, 0, 0.5, 3.0)]
    assert (decide(trials).chosen, decide(trials).state) == (1e-2, "tuned")
    without_score = [trial._replace(score=None) for trial in trials]
    assert decide(without_score).chosen == 1e-2
    # the headline's measure comes first, whatever the loss says
    assert decide([*trials, Trial(1.0, 0, 0.6, 9.0)]).chosen == 1.0


def test_scores_that_the_rows_cannot_tell_apart_are_told_apart_by_the_loss():
    """As measured: 60 steps, 300 validation rows; the rate of the highest score had hardly been trained."""
    measured = [(2e-4, 0.277, 5.43), (5.8e-4, 0.313, 3.388), (1.7e-3, 0.310, 2.667), (5e-3, 0.277, 2.62)]
    trials = [Trial(rate, 0, score, loss, 0.0256) for rate, score, loss in measured]
    assert (decide(trials).chosen, decide(trials).state) == (1.7e-3, "tuned")
    assert decide([trial._replace(error=0.0) for trial in trials]).chosen == 5.8e-4
    # what lies further off is worse, whatever its loss; what lies within is as good, and may be at the edge
    assert decide([trial._replace(error=0.04) for trial in trials]).open == ("above",)


def test_a_rate_is_judged_by_all_its_seeds():
    trials = [*tried(0.4, 0.5, 0.3), Trial(1e-3, 1, 0.7, 1.0), Trial(1e-2, 1, 0.5, 1.0), Trial(1e-1, 1, None, None)]
    assert decide(trials).chosen == pytest.approx(1e-3)
    assert decide(trials[::-1]) == decide(trials)


def test_what_is_missing_comes_with_the_command_that_adds_it():
    tuned, edge = decide(tried(0.3, 0.5, 0.4)), decide(tried(0.3, 0.4, 0.5))
    assert missing("a", "b", {"a": tuned, "b": tuned}, COMMAND) == ""
    said = missing("a", "b", {"a": tuned, "b": edge}, COMMAND)
    assert "the best learning rate of b, 0.1, is the largest one that was tried" in said
    assert f"{COMMAND} --set compare.learning_rate.grow=6 " in said
    said = waits_for(["a", "b", "c"], {}, COMMAND)
    assert said.startswith("the learning rates of a, b and c are not tuned")
    assert "of a is not tuned" in missing("a", "b", {"b": edge}, COMMAND)
    assert f"{COMMAND} --set compare.learning_rate.trials=5 " in missing("a", "b", {"b": edge}, COMMAND)
