"""Sentences claim what the intervals allow, and no more."""

from __future__ import annotations

import pytest

from multiflora.comparison.power import detectable
from multiflora.comparison.statistics import Interval, Spread
from multiflora.comparison.words import Claim, answer, sentence, verdict_of

BETTER = Claim(Interval(0.02, 0.01, 0.03), 0.004)
WORSE = Claim(Interval(-0.02, -0.03, -0.01), 0.0001)
OPEN = Claim(Interval(0.004, -0.01, 0.018), 0.8)
LESS_NATS = Claim(Interval(-0.05, -0.08, -0.02), 0.01, lower_is_better=True)


def test_a_difference_that_is_not_shown_is_not_claimed():
    said = sentence("rlora", "lora", {"score": OPEN}, 1.0, 3)
    assert said.startswith("Undecided: no difference between rlora and lora could be shown")


def test_an_interval_without_zero_claims_nothing_after_correction():
    spared = Claim(Interval(0.02, 0.001, 0.039), 0.12)
    assert "could be shown" in sentence("a", "b", {"score": spared}, 1.0, 3)


def test_a_difference_that_is_shown_is_claimed_with_its_interval():
    said = sentence("rlora", "lora", {"score": BETTER}, 0.98, 3)
    assert said == (
        "rlora did better than lora: its macro score was 2.0 points higher (95 % interval 1.0 to 3.0, p = 0.004 after "
        "correction). With 0.98 times the parameters and 3 seeds."
    )
    assert "did worse than lora: its macro score was 2.0 points lower" in sentence("a", "lora", {"score": WORSE}, 1, 3)


def test_fewer_nats_are_better():
    said = sentence("rlora", "lora", {"score": OPEN, "nll": LESS_NATS}, 1.0, 3)
    assert said.startswith("rlora did better than lora: its nats per token of the right answers were 0.0500 nats lower")
    assert "In macro score no difference could be shown" in said


def test_two_measures_may_disagree():
    said = sentence("a", "b", {"score": WORSE, "nll": LESS_NATS}, 1.0, 3)
    assert said.startswith("a did both better and worse than b")
    assert answer("b", {"b": {}, "a": {"score": WORSE, "nll": LESS_NATS}}) == (
        "a did better than b by one measure and worse by the other."
    )


def test_one_seed_says_nothing():
    alone = Claim(Interval(0.2, None, None), None)
    said = sentence("rlora", "lora", {"score": alone}, 1.0, 1)
    assert said.startswith("Nothing can be said of rlora against lora from one seed")
    assert alone.shown == 0


def test_the_answer_sorts_the_methods():
    claims = {"lora": {}, "a": {"score": BETTER}, "b": {"score": OPEN}, "c": {"score": WORSE}, "d": {"score": OPEN}}
    assert answer("lora", claims) == (
        "a did better than lora. c did worse than lora. Undecided: for b and d no difference to lora could be shown."
    )
    assert answer("lora", {"lora": {}, "b": {"score": OPEN}}) == (
        "Undecided: no difference to lora could be shown for any method (b)."
    )
    assert answer("lora", {"lora": {}}) == "There is nothing to compare lora with."


MARGIN = {"margin": 0.01, "level": 0.02}


@pytest.mark.parametrize(
    ("mean", "p", "p_margin", "verdict"),
    [
        (0.02, 0.001, 0.001, "better"),
        (-0.02, 0.001, 1.0, "worse"),
        (-0.004, 0.3, 0.001, "no worse"),
        (-0.004, 0.001, 0.001, "no worse"),  # it loses, and less than what matters
        (-0.004, 0.3, 0.3, "undecided"),
        (0.02, 0.02, 0.02, "undecided"),  # at the level is not below it
    ],
)
def test_the_four_verdicts(mean, p, p_margin, verdict):
    claim = Claim(Interval(mean, mean - 0.01, mean + 0.01), p, p_margin=p_margin, **MARGIN)
    assert claim.verdict == verdict
    assert claim._replace(tuned=False).verdict == "undecided"
    assert claim._replace(level=0.0).verdict == "undecided"


def test_the_verdict_is_the_scores_where_it_has_one():
    assert verdict_of({"score": WORSE, "nll": LESS_NATS}) == "worse"
    assert verdict_of({"score": OPEN, "nll": LESS_NATS}) == "better"
    assert verdict_of({}) == "undecided"


def test_what_could_be_seen_is_told_under_the_rule_that_is_used():
    spread = Spread(rows=1e-5, seeds=1e-4, freedom=4)
    for tests in (1, 8):
        claim = Claim(Interval(0.004, -0.01, 0.018), 0.8, spread=spread, tests=tests)
        said = sentence("a", "b", {"score": claim}, 1.0, 5)
        points = 100 * detectable(spread, 0.02 / tests)
        assert f"a true difference of {points:.1f} points would be found four times out of five" in said
    assert "Set compare.margin" in said
