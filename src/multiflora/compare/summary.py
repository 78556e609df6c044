"""From finished cells to a table, tests, and for each method one sentence that claims only what the intervals allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from multiflora.compare.plan import Competitor
from multiflora.compare.results import Measure, Row, Summary
from multiflora.compare.saved import COMPARISON
from multiflora.compare.spec import Comparison
from multiflora.compare.statistics import (
    Array,
    Difference,
    Interval,
    bootstrap_differences,
    crossed_tests,
    holm,
    macro_by_seed,
    paired_t,
    rank_methods,
    resample,
    t_interval,
)
from multiflora.compare.tuning import Tuning, missing, not_tuned
from multiflora.compare.words import Claim, answer, sentence
from multiflora.errors import DataError
from multiflora.evaluate.results import LOWER_IS_BETTER

__all__ = ["summarise"]

Cell = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Cells:
    """Finished cells, in order, and what their tasks can be measured by."""

    base: Cell
    by_label: Mapping[str, Sequence[Cell]]
    seeds: tuple[int, ...]
    trained: Sequence[str]
    extra: Sequence[str]

    def metric(self, task: str) -> str:
        """Name of a task's metric."""
        name: str = self.base["scores"]["tasks"][task]["metric"]
        return name

    def higher(self, tasks: Sequence[str]) -> list[str]:
        """The tasks where a higher score is better."""
        return [task for task in tasks if self.metric(task) not in LOWER_IS_BETTER]

    def with_nll(self) -> list[str]:
        """The trained tasks whose right completions have a probability."""
        return [task for task in self.trained if None not in self.base["rows"][task]["nll"]]

    def outcomes(self, label: str, tasks: Sequence[str], key: str) -> dict[str, Array]:
        """Task -> (seeds, rows)."""
        own = self.by_label[label]
        return {task: np.array([cell["rows"][task][key] for cell in own], dtype=np.float64) for task in tasks}

    def diverged(self, label: str) -> int:
        """How many of a method's trainings ended in no number."""
        tasks = self.with_nll()
        return sum(any(None in cell["rows"][task]["nll"] for task in tasks) for cell in self.by_label[label])


def summarise(
    comparison: Comparison,
    planned: Sequence[Competitor],
    cells: Sequence[Cell],
    tunings: Mapping[str, Tuning],
) -> Summary:
    """Sum up finished cells.

    Where some are missing, it speaks of the methods that have finished the seed that most have finished, with all seeds
    that these have in common: everything stays paired.

    Args:
        comparison: The comparison.
        planned: Its competitors.
        cells: One of the untrained model, and one for each method and seed, as far as they are finished.
        tunings: Label -> whether its learning rate is tuned; a label that is not there is not. A verdict is given on
            two tuned methods only.

    Raises:
        DataError: Cells were scored on different rows, so they cannot be paired.
    """
    reference = comparison.compare.reference()
    found, budget = _arranged(comparison, planned, cells), _budget(comparison, planned)
    baseline = next(item for item in planned if item.label == reference)
    planned = [item for item in planned if item.label in found.by_label]
    fit = [item.label for item in planned if not found.diverged(item.label)]
    families = {
        key: {label: found.outcomes(label, tasks, key) for label in fit}
        for key, tasks in (("score", found.higher(found.trained)), ("nll", found.with_nll()))
        if tasks and fit
    }
    measures = _measures(families, reference)
    by_task = {
        task: crossed_tests({label: found.outcomes(label, [task], "score") for label in fit}, reference)
        for task in found.trained
        if reference in fit
    }
    command = f"multiflora compare {_here(comparison.recipe.output / COMPARISON)}"
    waits = {item.label: missing(item.label, reference, tunings, command) for item in planned}
    rows = tuple(
        _row(item, baseline, found, measures, by_task, tunings.get(item.label), waits[item.label]) for item in planned
    )
    every = (*found.trained, *found.extra)
    scores = found.base["scores"]["tasks"]
    return Summary(
        answer=answer(
            reference, {row.label: _claims({"score": row.score, "nll": row.nll}, row.missing) for row in rows}
        )
        if reference in found.by_label
        else f"{reference}, the baseline, has no finished training yet, so nothing can be compared with it.",
        rows=rows,
        reference=reference,
        seeds=found.seeds,
        budget=budget,
        metrics={task: found.metric(task) for task in every},
        counts={task: scores[task]["n"] for task in every},
        extra=tuple(found.extra),
        base={task: scores[task]["score"] for task in every},
        curves={label: _curves(own[0], found.trained) for label, own in found.by_label.items()},
        device=found.base["device"],
        cells=sorted(cell["cell"] for cell in (found.base, *(c for own in found.by_label.values() for c in own))),
    )


def _arranged(comparison: Comparison, planned: Sequence[Competitor], cells: Sequence[Cell]) -> _Cells:
    """Sort cells by method and seed, leave out what cannot be paired, and check that the rest can."""
    _same_rows(cells)
    every: dict[str, dict[int, Cell]] = {item.label: {} for item in planned}
    for cell in cells:
        if cell["kind"] == "seed" and cell["label"] in every:
            every[cell["label"]][cell["seed"]] = cell
    order = comparison.compare.seeds
    # max keeps the first of equals
    most = max(order, key=lambda seed: sum(seed in own for own in every.values()))
    kept = {label: own for label, own in every.items() if most in own}
    seeds = tuple(seed for seed in order if all(seed in own for own in kept.values()))
    return _Cells(
        base=next(cell for cell in cells if cell["kind"] == "base"),
        by_label={label: [own[seed] for seed in seeds] for label, own in kept.items()},
        seeds=seeds,
        trained=[task.name for task in comparison.recipe.tasks],
        extra=[task.name for task in comparison.recipe.evaluate.extra_tasks],
    )


def _row(
    item: Competitor,
    baseline: Competitor,
    found: _Cells,
    measures: Mapping[str, Mapping[str, Measure]],
    by_task: Mapping[str, Mapping[str, Difference]],
    tuning: Tuning | None,
    wait: str,
) -> Row:
    """One method's row of the table."""
    own, diverged = found.by_label[item.label], found.diverged(item.label)
    measured = {key: measures.get(key, {}).get(item.label) for key in ("score", "nll")}
    said = sentence(
        item.label,
        baseline.label,
        _claims(measured, wait),
        item.parameters / baseline.parameters,
        len(found.seeds),
        wait,
    )
    if diverged:
        said = f"{item.label} diverged in {diverged} of {len(own)} trainings; lower its learning rate."
    every = {} if diverged else found.outcomes(item.label, (*found.trained, *found.extra), "score")
    return Row(
        label=item.label,
        method=item.name,
        rank=item.rank,
        parameters=item.parameters,
        flops=None if item.flops is None else item.flops.training,
        learning_rate=own[0]["learning_rate"],
        score=measured["score"],
        nll=measured["nll"],
        tasks={task: t_interval(values.mean(1)) for task, values in every.items()},
        task_differences={task: tests[item.label] for task, tests in by_task.items() if item.label in tests},
        kept=None if diverged else _kept(own, found.base, found.higher(found.extra)),
        seconds=_interval([cell["seconds"].get("train") for cell in own]),
        memory=_mean([cell["peak_memory_bytes"] for cell in own]),
        latency=_mean([cell["latency"]["extra"] for cell in own if cell["latency"]]),
        sentence=said,
        tuning=tuning or not_tuned(own[0]["learning_rate"]),
        missing=wait,
    )


def _measures(
    families: Mapping[str, Mapping[str, Mapping[str, Array]]], reference: str
) -> dict[str, dict[str, Measure]]:
    """Both measures of all methods, their p values corrected together: no winner by chance in either."""
    differences = {
        (key, label): difference
        for key, methods in families.items()
        if reference in methods
        for label, difference in crossed_tests(methods, reference).items()
    }
    known = [place for place, difference in differences.items() if difference.p is not None]
    corrected = dict(zip(known, holm([differences[place].p or 0.0 for place in known]), strict=True))
    found: dict[str, dict[str, Measure]] = {}
    for key, methods in families.items():
        totals = resample(methods)
        ranks = rank_methods(methods, totals, lower_is_better=key == "nll")
        drawn = bootstrap_differences(methods, totals, reference) if reference in methods else {}
        found[key] = {
            label: Measure(
                mean=t_interval(macro_by_seed(outcomes)),
                difference=differences.get((key, label)),
                p=corrected.get((key, label)),
                over_seeds=None
                if (key, label) not in differences
                else paired_t(macro_by_seed(outcomes), macro_by_seed(methods[reference])),
                bootstrap=drawn.get(label),
                rank=ranks[label],
            )
            for label, outcomes in methods.items()
        }
    return found


def _claims(found: Mapping[str, Measure | None], wait: str) -> dict[str, Claim]:
    """What the sentences are made of; ``wait`` says what a verdict waits for, if anything."""
    return {
        key: Claim(measure.difference.interval, measure.p, lower_is_better=key == "nll", tuned=not wait)
        for key, measure in found.items()
        if measure is not None and measure.difference is not None
    }


def _same_rows(cells: Sequence[Cell]) -> None:
    """Refuse cells that were scored on different rows."""
    first = cells[0]
    for cell in cells[1:]:
        for task, rows in cell["rows"].items():
            if rows["id"] != first["rows"][task]["id"]:
                raise DataError(
                    f"{cell['cell']} and {first['cell']} were scored on different rows of {task}, so they cannot be "
                    "compared row by row: the task's data have changed in between. Remove the older one's file from "
                    "the folder cells and start the comparison again."
                )


def _kept(cells: Sequence[Cell], base: Cell, tasks: Sequence[str]) -> Interval | None:
    """Change of the macro score on tasks that were not trained on."""
    if not tasks:
        return None
    before = np.mean([base["scores"]["tasks"][task]["score"] for task in tasks])
    after = [np.mean([cell["scores"]["tasks"][task]["score"] for task in tasks]) for cell in cells]
    return t_interval([float(value - before) for value in after])


def _curves(cell: Cell, tasks: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """(step, loss) of each task."""
    return {
        task: [
            (line["step"], line[f"loss/{task}"])
            for line in cell["log"]
            if line.get(f"loss/{task}") is not None and "step" in line
        ]
        for task in tasks
    }


def _here(path: Path) -> str:
    """A path as one would type it in the current folder."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _budget(comparison: Comparison, planned: Sequence[Competitor]) -> str:
    """What was equal, in words."""
    budget = comparison.compare.budget
    if budget.equal == "nothing":
        return "every method with the rank it was given"
    of = budget.of or comparison.compare.reference()
    what = "trainable parameters" if budget.equal == "parameters" else "operations added to a training token"
    if budget.target is not None:
        return f"{budget.target:,} {what} (nearest rank)"
    first = next(item for item in planned if item.label == of)
    amount = first.parameters if budget.equal == "parameters" or first.flops is None else first.flops.training
    return f"{amount:,} {what}, those of {of} (nearest rank)"


def _interval(values: Sequence[float | None]) -> Interval | None:
    known = [value for value in values if value is not None]
    return t_interval(known) if known else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
