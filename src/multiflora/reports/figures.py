"""The figures of a comparison's numbers, and of one run's: scores, differences, learning curves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from multiflora.analysis.plots import Drawing, bars, curves, heat_map
from multiflora.comparison.results import Measure, Row, Summary
from multiflora.comparison.statistics import Interval
from multiflora.evaluation.results import LOWER_IS_BETTER

__all__ = [
    "MEASURES",
    "course",
    "forgetting",
    "learning_curves",
    "run_curves",
    "run_scores",
    "scores",
    "task_differences",
    "validation_curves",
]

_POINTS = 120  # of a learning curve: more than a page can show


class MeasureWords(NamedTuple):
    """How a measure is told."""

    title: str
    short: str
    what: str
    unit: str
    factor: float
    digits: int
    of: Callable[[Row], Measure | None]


MEASURES = {
    "score": MeasureWords(
        "Macro score",
        "Macro score",
        "The mean score of the trained tasks where more is better, in points of 100.",
        "points of 100",
        100.0,
        1,
        lambda row: row.score,
    ),
    "nll": MeasureWords(
        "Nats per token of the right answers",
        "Nats per token",
        "The loss per token of the right answers, mean over the trained tasks: less is better.",
        "nats per token, less is better",
        1.0,
        4,
        lambda row: row.nll,
    ),
}


def scores(summary: Summary) -> Iterator[Drawing]:
    """Each measure of every method, and its difference to the baseline."""
    for key, words in MEASURES.items():
        found = {row.label: measure for row in summary.rows if (measure := words.of(row)) is not None}
        if not found:
            continue
        means = {label: _scaled(measure.mean, words.factor) for label, measure in found.items()}
        yield _intervals(
            f"means-{key}",
            words.title,
            "One dot for each method: the mean over seeds, with its 95 % interval on these test rows.",
            means,
            x=words.unit,
            digits=words.digits,
            zero=False,
        )
        differences = {
            label: _scaled(measure.difference.interval, words.factor)
            for label, measure in found.items()
            if measure.difference is not None
        }
        if differences:
            yield _intervals(
                f"differences-{key}",
                f"{words.title}: difference to {summary.reference}",
                "The 95 % interval speaks of new seeds and new rows, and is not corrected for the number of methods: "
                "one that reaches 0 shows no difference, and one that does not may still be chance; the table's p "
                "decides.",
                differences,
                x=words.unit,
                digits=words.digits,
                zero=True,
            )


def forgetting(summary: Summary) -> Iterator[Drawing]:
    """What became of tasks that were not trained on."""
    kept = {row.label: _scaled(row.kept, 100) for row in summary.rows if row.kept is not None}
    if kept:
        yield _intervals(
            "forgetting",
            "Tasks that were not trained on",
            "Change of their macro score against the untrained model, with its 95 % interval over seeds: left of 0 is "
            "forgetting.",
            kept,
            x="points of 100",
            digits=1,
            zero=True,
        )


def task_differences(summary: Summary) -> Iterator[Drawing]:
    """Every method's difference to the baseline in every task, as shades."""
    rows = [row for row in summary.rows if row.task_differences and row.label != summary.reference]
    tasks = [
        task
        for task, metric in summary.metrics.items()
        if metric not in LOWER_IS_BETTER and any(task in row.task_differences for row in rows)
    ]
    if not rows or not tasks:
        return
    values = [
        [100 * row.task_differences[t].interval.mean if t in row.task_differences else None for t in tasks]
        for row in rows
    ]
    largest = max((abs(v) for line in values for v in line if v is not None), default=0.0) or 1.0
    yield heat_map(
        "task-differences",
        f"Where the differences to {summary.reference} are",
        "Points of 100, one row for each method, one column for each task: blue is better, red is worse. Most of it is "
        "chance: the intervals are in the table.",
        values,
        rows=[row.label for row in rows],
        columns=tasks,
        low=-largest,
        high=largest,
        diverging=True,
        digits=1,
        alt="Differences in points: "
        + "; ".join(
            f"{row.label} " + ", ".join(f"{t} {v:+.1f}" for t, v in zip(tasks, line, strict=True) if v is not None)
            for row, line in zip(rows, values, strict=True)
        )
        + ".",
    )


def course(summary: Summary) -> Iterator[Drawing]:
    """Macro scores on the way through the training, where they were asked for."""
    series = {
        row.label: ([100 * share for share, _ in row.course], [100 * score.mean for _, score in row.course])
        for row in summary.rows
        if len(row.course) > 1
    }
    if series:
        yield curves(
            "course",
            "Macro score over the training",
            "Points of 100, mean over seeds, on the rows of the table above. Lines that cross tell which method is "
            "faster and which one gets further.",
            series,
            x="per cent of the steps",
            y="points of 100",
            alt="Macro score over the training. "
            + "; ".join(
                f"{row.label} " + ", ".join(f"{100 * m.mean:.1f} after {100 * s:.3g} %" for s, m in row.course)
                for row in summary.rows
                if row.label in series
            )
            + ".",
        )


def learning_curves(summary: Summary) -> Iterator[Drawing]:
    """One figure for each task: the methods' training losses."""
    for number, task in enumerate(task for task in summary.metrics if task not in summary.extra):
        series = {
            row.label: _thinned(summary.curves[row.label][task])
            for row in summary.rows
            if len(summary.curves.get(row.label, {}).get(task) or ()) > 1
        }
        if series:
            last = {label: ys[-1] for label, (_, ys) in series.items()}
            yield curves(
                f"curve-{number}",
                f"Training loss on {task}",
                "Nats per token that carries loss, first seed. A lower training loss is no better score.",
                series,
                x="step",
                y="nats per token",
                alt=f"Training loss on {task}. At the end: " + ", ".join(f"{k} {v:.3f}" for k, v in last.items()) + ".",
            )


_CURVES = {
    "nats per token": "Nats per token that carries loss. A task whose line does not fall has not been learned.",
    "nats per pair": "Nats per pair; 0.693 is no preference. A task whose line does not fall has not been learned.",
    "mean reward": "What the model's own answers were worth. A task whose line does not rise has not been learned.",
}
"""What a log is drawn in -> what to say of it."""


def run_curves(log: Sequence[Mapping[str, Any]]) -> Iterator[Drawing]:
    """A run's training loss, or what its answers were worth, task by task."""
    rewarded = any(key.startswith("reward/") for line in log for key in line)
    kind = "reward" if rewarded else "loss"
    compared = any(key.startswith("accuracy/") for line in log for key in line)
    unit = "mean reward" if rewarded else "nats per pair" if compared else "nats per token"
    tasks = dict.fromkeys(key for line in log for key in line if key.startswith(f"{kind}/"))
    steps = [line for line in log if "step" in line]
    series = {
        key.partition("/")[2]: _thinned([(line["step"], line[key]) for line in steps if line.get(key) is not None])
        for key in tasks
    }
    series = {task: pair for task, pair in series.items() if len(pair[0]) > 1}
    if series:
        yield curves(
            "curves",
            f"Training {kind} by task",
            _CURVES[unit],
            series,
            x="step",
            y=unit,
            alt=f"{kind.capitalize()} at the start and the end: "
            + ", ".join(f"{task} {ys[0]:.3f} to {ys[-1]:.3f}" for task, (_, ys) in series.items())
            + ".",
        )


def validation_curves(points: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None = None) -> Iterator[Drawing]:
    """A run's scores on validation rows, task by task; tasks scored in nats have a figure of their own.

    Args:
        points: Step and scores of each time they were scored.
        best: The step that was kept, and by what; None: the last one was.
    """
    tasks = {task: score["metric"] for point in points[:1] for task, score in point["scores"]["tasks"].items()}
    kept = "" if best is None else f" The adapter of step {best['step']:,} was kept."
    for name, is_nats, y, factor, digits in (
        ("validation", False, "points of 100", 100, 1),
        ("validation-nats", True, "nats per token", 1, 3),
    ):
        series = {
            task: (
                [point["step"] for point in points],
                [factor * point["scores"]["tasks"][task]["score"] for point in points],
            )
            for task, metric in tasks.items()
            if (metric in LOWER_IS_BETTER) == is_nats
        }
        if series and len(points) > 1:
            yield curves(
                name,
                "Nats on validation rows by task" if is_nats else "Scores on validation rows by task",
                f"{'Nats per token, less is better' if is_nats else 'Points of 100'}. A line that has turned means "
                f"that the task was better off with fewer steps.{kept}",
                series,
                x="step",
                y=y,
                alt=f"First, {'lowest' if is_nats else 'highest'} and last score on validation rows: "
                + ", ".join(
                    f"{task} {ys[0]:.{digits}f}, {(min if is_nats else max)(ys):.{digits}f}, {ys[-1]:.{digits}f}"
                    for task, (_, ys) in series.items()
                )
                + "."
                + kept,
            )


def run_scores(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> Iterator[Drawing]:
    """Every task's score before and after, in points; tasks where lower is better are left to the table."""
    found = {task: score for task, score in after["tasks"].items() if score["metric"] not in LOWER_IS_BETTER}
    if not found:
        return
    values = {task: 100 * score["score"] for task, score in found.items()}
    ends = {
        task: (values[task] - 196 * score["stderr"], values[task] + 196 * score["stderr"])
        for task, score in found.items()
        if score["stderr"] is not None
    }
    was = {task: 100 * before["tasks"][task]["score"] for task in found if before and task in before["tasks"]}
    yield bars(
        "scores",
        "Scores before and after",
        "Hollow: the base model. Filled: with the adapter, and the 95 % interval that these test rows allow.",
        values,
        ends=ends,
        before=was,
        x="points of 100",
        zero=False,
        alt="Scores: "
        + ", ".join(
            f"{task} {was[task]:.1f} to {value:.1f}" if task in was else f"{task} {value:.1f}"
            for task, value in values.items()
        )
        + ".",
    )


def _intervals(
    name: str, title: str, reading: str, found: Mapping[str, Interval], *, x: str, digits: int, zero: bool
) -> Drawing:
    def told(i: Interval) -> str:
        ends = "" if i.low is None or i.high is None else f" ({i.low:.{digits}f} to {i.high:.{digits}f})"
        return f"{i.mean:.{digits}f}{ends}"

    return bars(
        name,
        title,
        reading,
        {label: i.mean for label, i in found.items()},
        ends={label: (i.low, i.high) for label, i in found.items() if i.low is not None and i.high is not None},
        x=x,
        zero=zero,
        alt=f"{title}: " + ", ".join(f"{label} {told(i)}" for label, i in found.items()) + ".",
    )


def _scaled(interval: Interval, factor: float) -> Interval:
    return Interval(*(None if value is None else factor * value for value in interval))  # type: ignore[arg-type]


def _thinned(line: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Steps and losses, neighbours averaged where there are more than can be shown."""
    every = -(-len(line) // _POINTS)
    parts = [line[start : start + every] for start in range(0, len(line), every)]
    return [fmean(p[0] for p in part) for part in parts], [fmean(p[1] for p in part) for part in parts]
