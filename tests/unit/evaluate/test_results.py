"""Reading scores out of the harness's results, and averaging them."""

from __future__ import annotations

from typing import Any

import pytest

from multiflora.evaluate.results import TaskScore, macro_average, main_metric, mean_nll, task_score


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


def test_nats_are_per_token_of_the_right_choice() -> None:
    samples = [
        {"doc": {"answer": 1, "tokens": 2}, "filtered_resps": [(-9.0, False), (-4.0, True)]},
        {"doc": {"answer": 0, "tokens": 1}, "filtered_resps": [(-1.0, True), (-9.0, False)]},
    ]
    assert mean_nll(samples) == pytest.approx((2.0 + 1.0) / 2)
