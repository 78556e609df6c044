"""A comparison's tables: every number of the summary, with its interval."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from multiflora.comparison.results import Row, Summary
from multiflora.comparison.spec import Published
from multiflora.comparison.statistics import CLAIM, Interval
from multiflora.evaluation.results import LOWER_IS_BETTER
from multiflora.recipe import Recipe
from multiflora.reports.figures import MEASURES, MeasureWords
from multiflora.reports.tables import NOTHING, Cell, Column, Table, difference, interval, number, p_value, size, word

__all__ = [
    "by_task",
    "cost",
    "methods",
    "published",
    "scale_of",
    "second_opinions",
    "task_differences",
    "tasks",
]

_METHOD = Column("Method", ("method",), numeric=False)


def methods(summary: Summary) -> Iterator[Table]:
    """All methods, the best first, with what was shown of them: a table for each measure."""
    for key, words in MEASURES.items():
        rows = [row for row in sorted(summary.rows, key=_order(key)) if words.of(row)]
        if rows:
            yield Table(
                name=f"table-{key}",
                title=words.title,
                reading=f"{words.what} Below each number is its 95 % interval. A mark (▲ better, ▼ worse) stands only "
                f"where a difference was shown: p below {CLAIM}, corrected for all methods and measures. What "
                "could be seen is the true difference that would be found four times out of five by that rule.",
                columns=[
                    _METHOD,
                    Column("Rank", ("rank",)),
                    Column("Trained parameters", ("parameters",)),
                    Column(words.short, _ends("mean")),
                    Column(f"Difference to {summary.reference}", _ends("difference")),
                    Column("p, corrected", ("p_corrected",)),
                    Column("Verdict", ("verdict",), numeric=False),
                    Column("What could be seen", ("detectable",)),
                ],
                rows=[
                    [_name(row, summary), number(row.rank), number(row.parameters), *_measured(row, words)]
                    for row in rows
                ],
            )


def by_task(summary: Summary) -> Table:
    """Every task's own metric, the untrained model first."""
    columns = [_METHOD]
    for task, metric in summary.metrics.items():
        note = ", not trained" if task in summary.extra else ""
        columns.append(Column(f"{task} ({metric}{note})", _ends(task)))
    scales = {task: scale_of(summary, task) for task in summary.metrics}
    base = [number(summary.base[task], digits, factor=factor) for task, (digits, factor) in scales.items()]
    rows = [[word("untrained model"), *base]]
    for row in sorted(summary.rows, key=_order()):
        cells = [interval(row.tasks.get(task), digits, factor=factor) for task, (digits, factor) in scales.items()]
        rows.append([_name(row, summary), *cells])
    return Table(
        name="table-tasks",
        title="Scores of every task",
        reading="Each task in its own metric, mean over seeds with the 95 % interval over seeds on these test rows.",
        columns=columns,
        rows=rows,
    )


def task_differences(summary: Summary) -> Iterator[Table]:
    """Differences to the baseline, task by task; no table where there are none."""
    rows = [row for row in summary.rows if row.task_differences and row.label != summary.reference]
    if not rows:
        return
    tasks = [task for task in summary.metrics if any(task in row.task_differences for row in rows)]
    lines = []
    for row in rows:
        line = [word(row.label)]
        for task in tasks:
            found = row.task_differences.get(task)
            digits, factor = scale_of(summary, task)
            cell = difference(found.interval, 0, digits, factor=factor) if found else NOTHING
            line.append(Cell(cell.text, (*cell.values, found.p) if found else (), cell.below))
        lines.append(line)
    yield Table(
        name="table-task-differences",
        title=f"Differences to {summary.reference} in every task",
        reading="To explore, not to claim: with this many cells some intervals miss 0 by chance alone, and nothing is "
        "corrected here.",
        columns=[_METHOD, *(Column(task, (*_ends(task), f"{task}_p_uncorrected")) for task in tasks)],
        rows=lines,
    )


def second_opinions(summary: Summary) -> Table:
    """The same differences by another test, on which no claim rests."""
    columns = [_METHOD]
    for key, words in MEASURES.items():
        columns += [
            Column(f"{words.short}: p over seeds", (f"{key}_p_over_seeds",)),
            Column(f"{words.short}: interval over seeds", _ends(f"{key}_over_seeds")),
        ]
    rows = []
    for row in summary.rows:
        if row.label == summary.reference:
            continue
        line = [word(row.label)]
        for words in MEASURES.values():
            measure = words.of(row)
            over = measure.over_seeds if measure else None
            line += [
                p_value(over.p if over else None),
                interval(over.interval if over else None, words.digits, factor=words.factor, signed=True),
            ]
        rows.append(line)
    return Table(
        name="table-second-opinions",
        title=f"Differences to {summary.reference} by another test",
        reading="The plain paired t-test over seeds speaks of these test rows only, and is not corrected.",
        columns=columns,
        rows=rows,
    )


def cost(summary: Summary) -> Table:
    """What every method took, and what became of other tasks."""
    columns = [
        _METHOD,
        Column("Trained parameters", ("parameters",)),
        Column("Operations a training token", ("operations_per_training_token",)),
        Column("Learning rate", ("learning_rate",)),
        Column("Training, seconds", _ends("seconds")),
        Column("Peak memory", ("peak_memory_bytes",)),
        Column("Extra latency", ("extra_latency",)),
        *([Column("Tasks not trained on", _ends("kept"))] if summary.extra else []),
    ]
    rows = [
        [
            _name(row, summary),
            number(row.parameters),
            number(row.flops),
            Cell(f"{row.learning_rate:.3g}", (row.learning_rate,)),
            _seconds(row.seconds),
            size(row.memory),
            number(row.latency, factor=100, unit=" %", signed=True),
            *([interval(row.kept, signed=True)] if summary.extra else []),
        ]
        for row in summary.rows
    ]
    extra = (
        f" Tasks not trained on ({', '.join(summary.extra)}): points of 100 against the untrained model; below 0 is "
        "forgetting."
        if summary.extra
        else ""
    )
    return Table(
        name="table-cost",
        title="Parameters, time and memory",
        reading="Operations are those that the adapter adds. Extra latency is the share that it adds to a forward pass "
        "of one row of 128 tokens. Time and memory are this machine's; other work on it shows in them." + extra,
        columns=columns,
        rows=rows,
    )


def _seconds(found: Interval | None) -> Cell:
    """A time, whose interval is shown from 0 on."""
    if found is None or found.low is None:
        return interval(found, 0, factor=1)
    return Cell(f"{found.mean:,.0f}", tuple(found), f"{max(found.low, 0):,.0f} to {found.high:,.0f}")


def published(tables: Sequence[Published]) -> list[Table]:
    """The papers' own tables, as printed."""
    return [
        Table(
            name=f"table-published-{k}",
            title=table.title,
            reading=table.source,
            columns=[_METHOD, *(Column(name, (name,)) for name in table.columns)],
            rows=[
                [word(name), *(NOTHING if v is None else Cell(f"{v:g}", (v,)) for v in numbers)]
                for name, numbers in table.rows.items()
            ],
        )
        for k, table in enumerate(tables)
    ]


def tasks(recipe: Recipe, summary: Summary) -> Table:
    """What each task is, as far as it is said."""
    every = (*recipe.tasks, *recipe.evaluate.extra_tasks)
    theirs = [name for name in summary.extra if name.startswith("harness/")]
    has_about, has_licence = any(task.about for task in every), any(task.licence for task in every)
    return Table(
        name="table-data",
        title="The tasks",
        reading="What they are scored by, what they ask, and the licence of their data, as far as it is said.",
        columns=[
            Column("Task", ("task",), numeric=False),
            Column("Metric", ("metric",), numeric=False),
            Column("Test rows", ("rows",)),
            *([Column("About", ("about",), numeric=False)] if has_about else []),
            *([Column("Licence", ("licence",), numeric=False)] if has_licence else []),
        ],
        rows=[
            [
                word(task.name, "not trained on" if task.name in summary.extra else ""),
                word(summary.metrics[task.name]),
                number(summary.counts[task.name]),
                *([word(task.about) if task.about else NOTHING] if has_about else []),
                *([word(task.licence) if task.licence else NOTHING] if has_licence else []),
            ]
            for task in every
        ]
        + [
            [
                word(name.removeprefix("harness/"), "lm-evaluation-harness"),
                word(summary.metrics[name]),
                number(summary.counts[name]),
                *[NOTHING] * (has_about + has_licence),
            ]
            for name in theirs
        ],
    )


def _measured(row: Row, words: MeasureWords) -> list[Cell]:
    """A measure's five cells."""
    measure = words.of(row)
    assert measure is not None
    found = measure.difference
    sign = {"better": 1, "worse": -1}.get(measure.verdict, 0)
    return [
        interval(measure.mean, words.digits, factor=words.factor),
        difference(found.interval, sign, words.digits, factor=words.factor) if found else NOTHING,
        p_value(measure.p),
        word(measure.verdict) if found else NOTHING,
        number(measure.detectable, words.digits, factor=words.factor),
    ]


def _order(key: str = "score") -> Callable[[Row], float]:
    """The best first; what has no number last."""

    def place(row: Row) -> float:
        measure = MEASURES[key].of(row)
        if measure is None:
            return float("inf")
        return measure.mean.mean if key == "nll" else -measure.mean.mean

    return place


def _name(row: Row, summary: Summary) -> Cell:
    if row.label == summary.reference:
        return word(row.label, "baseline")
    return word(row.label, row.method if row.method != row.label else "")


def scale_of(summary: Summary, task: str) -> tuple[int, float]:
    """Digits, and the factor that a task's numbers are shown times."""
    return (4, 1.0) if summary.metrics[task] in LOWER_IS_BETTER else (1, 100.0)


def _ends(name: str) -> tuple[str, str, str]:
    """Names of a mean and its interval in a CSV."""
    return name, f"{name}_low", f"{name}_high"
