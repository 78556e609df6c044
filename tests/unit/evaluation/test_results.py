"""Reading scores out of the harness's results, and averaging them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from multiflora.evaluation.results import TaskScore, example_scores, macro_average, main_metric, mean_nll, task_score


def score(value: float, metric: str = "acc", group: Any = "tasks") -> TaskScore:
    return TaskScore(score=value, metric=metric, n=1, stderr=None, nll=None, other={}, group=group)


def test_the_macro_average_weighs_tasks_alike_and_leaves_out_nats_and_other_groups() -> None:
    scores = {
        "a": score(0.2),
        "b": score(0.6, "rougeL"),
        "c": score(3.0, "nll"),
        "d": score(1.0, group="extra"),
        "harness/e": score(1.0, group="harness"),
    }
    assert macro_average(scores) == pytest.approx(0.4)
    assert macro_average({"c": score(3.0, "nll")}) is None
    assert macro_average({}) is None


def test_a_score_is_read_with_its_error_and_its_companions() -> None:
    found = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.75, "acc_norm_stderr,none": 0.2}
    assert task_score(found, "acc", n=8, nll=1.5) == {
        "score": 0.5,
        "metric": "acc",
        "n": 8,
        "stderr": 0.1,
        "nll": 1.5,
        "other": {"acc_norm": 0.75},
        "group": "tasks",
    }


def test_of_several_filters_the_first_counts() -> None:
    found = {"exact_match,strict-match": 0.25, "exact_match,flexible-extract": 0.75}
    assert main_metric(found) == "exact_match"
    assert task_score(found, "exact_match", n=4)["score"] == 0.25


def test_an_error_that_is_not_a_number_is_none() -> None:
    assert task_score({"nll,none": 2.0, "nll_stderr,none": "N/A"}, "nll", n=1)["stderr"] is None
    assert task_score({"nll,none": 2.0}, "nll", n=1)["nll"] == 2.0


def test_nats_of_choices_are_normalised_over_them_and_know_nothing_of_their_form() -> None:
    samples = [
        {"doc": {"id": "a", "answer": 1, "choices": ["x", "y"]}, "filtered_resps": [(-9.0, False), (-4.0, True)]},
        {"doc": {"id": "b", "answer": 0, "choices": ["x", "y"]}, "filtered_resps": [(-1.0, True), (-1.0, False)]},
    ]
    assert mean_nll(samples) == pytest.approx((math.log(1 + math.exp(-5)) + math.log(2)) / 2)
    rarer = [{**s, "filtered_resps": [(value - 800, greedy) for value, greedy in s["filtered_resps"]]} for s in samples]
    assert mean_nll(rarer) == pytest.approx(mean_nll(samples))
    rows = example_scores([{**sample, "acc": 1.0} for sample in samples], "acc")
    assert sum(row["nll"] for row in rows) / 2 == pytest.approx(mean_nll(samples))
