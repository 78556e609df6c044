"""The table of scores, as it stands on a terminal of 80 columns."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from multiflora.evaluation.results import Results, TaskScore
from multiflora.evaluation.table import results_table, side_by_side_table


def score(value: float, metric: str = "acc", **changes: Any) -> TaskScore:
    one: dict[str, Any] = {"stderr": 0.035, "nll": None, "other": {}, "group": "tasks", **changes}
    return TaskScore(score=value, metric=metric, n=1319, **one)


BASE: Results = {"tasks": {"commonsenseqa": score(0.25), "gsm8k": score(1.33, "nll")}, "macro": 0.25}
ADAPTED: Results = {
    "tasks": {
        "commonsenseqa": score(0.5),
        "gsm8k": score(1.11, "nll", stderr=None),
        "piqa": score(0.63, group="extra"),
        "harness/arc_easy": score(0.56, group="harness"),
    },
    "macro": 0.5,
}


def shown(table: Table, width: int = 80) -> list[list[str]]:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return [line.split() for line in console.export_text().splitlines() if line.strip()]


def test_before_after_and_change_with_the_macro_average_last() -> None:
    assert shown(results_table(ADAPTED, BASE)) == [
        ["task", "n", "metric", "base", "adapted", "change"],
        ["commonsenseqa", "1,319", "acc", "0.250", "±0.035", "0.500", "±0.035", "+0.250"],
        ["gsm8k", "1,319", "nll", "↓", "1.330", "±0.035", "1.110", "-0.220"],
        ["not", "trained", "on"],
        ["piqa", "1,319", "acc", "–", "0.630", "±0.035", "–"],
        ["lm-evaluation-harness"],
        ["arc_easy", "1,319", "acc", "–", "0.560", "±0.035", "–"],
        ["macro", "average", "0.250", "±0.035", "0.500", "±0.035", "+0.250"],
    ]


def test_one_model_alone_has_one_column_of_scores() -> None:
    lines = shown(results_table(ADAPTED))
    assert lines[0] == ["task", "n", "metric", "score"]
    assert lines[-1] == ["macro", "average", "0.500", "±0.035"]


def test_green_is_better_even_where_lower_is_better() -> None:
    changes = [str(cell.style) for cell in results_table(ADAPTED, BASE).columns[-1].cells if hasattr(cell, "style")]
    assert changes[:2] == ["green", "green"]
    worse = [str(cell.style) for cell in results_table(BASE, ADAPTED).columns[-1].cells if hasattr(cell, "style")]
    assert worse[:2] == ["red", "red"]


def test_a_long_name_folds_and_no_number_is_lost() -> None:
    name = "a_task_with_a_name_that_is_far_too_long_for_any_table_of_eighty_columns"
    base: Results = {"tasks": {name: score(0.25, "acc_bytes")}, "macro": 0.25}
    words = [word for line in shown(results_table(base, base)) for word in line]
    assert {"1,319", "acc_bytes", "0.250", "±0.035", "+0.000"} <= set(words)


def test_without_an_average_there_is_no_last_row() -> None:
    alone: Results = {"tasks": {"gsm8k": score(1.0, "nll")}, "macro": None}
    assert shown(results_table(alone, alone))[-1][0] == "gsm8k"


def test_adapters_stand_side_by_side_and_what_was_not_scored_is_a_dash() -> None:
    partial: Results = {"tasks": {"gsm8k": score(1.21, "nll", stderr=None)}, "macro": None}
    assert shown(side_by_side_table(BASE, {"whole": ADAPTED, "[bold]part": partial}), width=120) == [
        ["task", "n", "metric", "base", "whole", "[bold]part"],
        ["commonsenseqa", "1,319", "acc", "0.250", "±0.035", "0.500", "±0.035", "–"],
        ["gsm8k", "1,319", "nll", "↓", "1.330", "±0.035", "1.110", "1.210"],
        ["macro", "average", "0.250", "±0.035", "0.500", "±0.035", "–"],
    ]
    nats: Results = {"tasks": {"gsm8k": score(1.0, "nll")}, "macro": None}
    assert shown(side_by_side_table(nats, {"a": nats, "b": nats}))[-1][0] == "gsm8k"
