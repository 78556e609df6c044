"""Tables of scores, the macro average last: every task before and after, or of several adapters side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.markup import escape
from rich.text import Text

from multiflora.evaluation.results import LOWER_IS_BETTER, Group, Results, TaskScore, macro_words
from multiflora.text_table import TextTable

__all__ = ["results_table", "side_by_side_table"]

_TITLES: dict[Group, str] = {"extra": "not trained on", "harness": "lm-evaluation-harness"}


def results_table(adapted: Results, base: Results | None = None) -> TextTable:
    """Return the scores as a table, which fits 80 columns.

    Args:
        adapted: Scores of the model.
        base: Scores of the same tasks before training; None: one column of scores.

    Example:
        >>> score = {"score": 0.5, "metric": "acc", "n": 4, "stderr": 0.25, "nll": None, "other": {}, "group": "tasks"}
        >>> [column.header for column in results_table({"tasks": {"sst2": score}, "macro": 0.5}).columns]
        ['task', 'n', 'metric', 'score']
    """
    table = _table("score" if base is None else "base", *(() if base is None else ("adapted", "change")))
    for name, score in _rows(table, adapted):
        before = None if base is None else base["tasks"].get(name)
        table.add_row(*_what(name, score), *_cells(score, before, base is not None))
    if adapted["macro"] is not None:
        table.add_section()
        table.add_row(*(Text(cell, style="bold") if isinstance(cell, str) else cell for cell in _macro(adapted, base)))
    return table


def side_by_side_table(base: Results, adapters: Mapping[str, Results]) -> TextTable:
    """Return the scores of a base model and of adapters on it as a table, a column for each.

    Args:
        base: Scores without an adapter, of all tasks.
        adapters: Name -> scores; a task that one of them lacks is a dash there.

    Example:
        >>> score = {"score": 0.5, "metric": "acc", "n": 4, "stderr": 0.25, "nll": None, "other": {}, "group": "tasks"}
        >>> one = {"tasks": {"sst2": score}, "macro": 0.5}
        >>> [column.header for column in side_by_side_table(one, {"lora": one, "rlora": one}).columns]
        ['task', 'n', 'metric', 'base', 'lora', 'rlora']
    """
    table = _table("base", *adapters)
    columns = [base, *adapters.values()]
    for name, score in _rows(table, base):
        found = [results["tasks"].get(name) for results in columns]
        table.add_row(*_what(name, score), *("–" if one is None else _with_error(one) for one in found))
    if any(results["macro"] is not None for results in columns):
        table.add_section()
        means = ("–" if results["macro"] is None else macro_words(results) for results in columns)
        table.add_row(*(Text(cell, style="bold") for cell in ("macro average", "", "", *means)))
    return table


def _table(*headers: str) -> TextTable:
    """A table without rows: what was scored, then these columns."""
    table = TextTable("task")
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    for header in headers:
        table.add_column(escape(header), justify="right", no_wrap=True)
    return table


def _rows(table: TextTable, results: Results) -> Iterator[tuple[str, TaskScore]]:
    """Go through the tasks, with a title in the table before each further group."""
    group: Group = "tasks"
    for name, score in results["tasks"].items():
        if score["group"] != group:
            group = score["group"]
            table.add_section()
            table.add_row(Text(_TITLES[group], style="italic dim"))
        yield name, score


def _what(name: str, score: TaskScore) -> tuple[str, str, str]:
    """The first cells of a row."""
    return name.removeprefix("harness/"), f"{score['n']:,}", _metric(score)


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
