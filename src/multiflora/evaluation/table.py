"""The table that a run ends in: every task before and after, the macro average last. Fits 80 columns."""

from __future__ import annotations

from rich.text import Text

from multiflora.evaluation.results import LOWER_IS_BETTER, Group, Results, TaskScore, macro_words
from multiflora.text_table import TextTable

__all__ = ["results_table"]

_TITLES: dict[Group, str] = {"extra": "not trained on", "harness": "lm-evaluation-harness"}


def results_table(adapted: Results, base: Results | None = None) -> TextTable:
    """Return the scores as a table.

    Args:
        adapted: Scores of the model.
        base: Scores of the same tasks before training; None: one column of scores.

    Example:
        >>> score = {"score": 0.5, "metric": "acc", "n": 4, "stderr": 0.25, "nll": None, "other": {}, "group": "tasks"}
        >>> [column.header for column in results_table({"tasks": {"sst2": score}, "macro": 0.5}).columns]
        ['task', 'n', 'metric', 'score']
    """
    table = TextTable("task")
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    for header in ("score",) if base is None else ("base", "adapted", "change"):
        table.add_column(header, justify="right", no_wrap=True)
    group: Group = "tasks"
    for name, score in adapted["tasks"].items():
        if score["group"] != group:
            group = score["group"]
            table.add_section()
            table.add_row(Text(_TITLES[group], style="italic dim"))
        before = None if base is None else base["tasks"].get(name)
        table.add_row(
            name.removeprefix("harness/"), f"{score['n']:,}", _metric(score), *_cells(score, before, base is not None)
        )
    if adapted["macro"] is not None:
        table.add_section()
        table.add_row(*(Text(cell, style="bold") if isinstance(cell, str) else cell for cell in _macro(adapted, base)))
    return table


def _metric(score: TaskScore) -> str:
    """The metric's name, with an arrow where lower is better."""
    return f"{score['metric']} ↓" if score["metric"] in LOWER_IS_BETTER else score["metric"]


def _cells(score: TaskScore, before: TaskScore | None, has_base: bool) -> list[str | Text]:
    """Scores with their standard errors, and the change where there are two."""
    if not has_base:
        return [_with_error(score)]
    if before is None:
        return ["–", _with_error(score), "–"]
    sign = -1.0 if score["metric"] in LOWER_IS_BETTER else 1.0
    return [_with_error(before), _with_error(score), _change(score["score"] - before["score"], sign)]


def _with_error(score: TaskScore) -> str:
    return f"{score['score']:.3f}" + ("" if score["stderr"] is None else f" ±{score['stderr']:.3f}")


def _change(difference: float, sign: float) -> Text:
    """A signed difference, green where the model got better and red where it got worse."""
    gain = round(difference, 3) * sign
    return Text(f"{difference:+.3f}", style="green" if gain > 0 else "red" if gain < 0 else "")


def _macro(adapted: Results, base: Results | None) -> list[str | Text]:
    """The last row."""
    after, before = adapted["macro"], None if base is None else base["macro"]
    assert after is not None  # asked before the row is made
    if base is None:
        return ["macro average", "", "", macro_words(adapted)]
    if before is None:
        return ["macro average", "", "", "–", macro_words(adapted), "–"]
    return ["macro average", "", "", macro_words(base), macro_words(adapted), _change(after - before, 1.0)]
