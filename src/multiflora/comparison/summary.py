"""From finished cells to a table, tests, and for each method one sentence that claims only what the intervals allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from multiflora.comparison.forgetting import forgetting, forgetting_words
from multiflora.comparison.looks import Look, look_at
from multiflora.comparison.paired import Cell, PairedCells, arrange
from multiflora.comparison.plan import Competitor
from multiflora.comparison.power import detectable
from multiflora.comparison.results import Measure, Row, Summary
from multiflora.comparison.spec import Comparison, command_of
from multiflora.comparison.statistics import (
    Array,
    Difference,
    Interval,
    crossed_tests,
    holm,
    macro_by_seed,
    p_value,
    paired_t,
    t_interval,
)
from multiflora.comparison.tuning import Tuning, missing, not_tuned
from multiflora.comparison.words import Claim, answer, sentence, verdict_of

__all__ = ["claims_of", "summarise"]


def summarise(
    comparison: Comparison,
    planned: Sequence[Competitor],
    cells: Sequence[Cell],
    tunings: Mapping[str, Tuning],
    taken: Sequence[Mapping[str, Any]] = (),
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
        taken: The looks at these cells that were taken before, see `multiflora.comparison.looks`.

    Raises:
        DataError: Cells were scored on different rows, so they cannot be paired.
    """
    reference = comparison.compare.reference()
    found, budget = arrange(comparison, planned, cells), _budget(comparison, planned)
    baseline = next(item for item in planned if item.label == reference)
    planned = [item for item in planned if item.label in found.by_label]
    fit = [item.label for item in planned if not found.diverged(item.label)]
    families = {
        key: {label: found.outcomes(label, tasks, key) for label in fit}
        for key, tasks in (("score", found.higher(found.trained)), ("nll", found.with_nll()))
        if tasks and fit
    }
    look = look_at(found.seeds, comparison.compare.looks(), taken)
    command = command_of(comparison)
    waits = {item.label: missing(item.label, reference, tunings, command) for item in planned}
    margin = None if comparison.compare.margin is None else comparison.compare.margin / 100
    differences = {
        (key, label): difference
        for key, methods in families.items()
        if reference in methods
        for label, difference in crossed_tests(methods, reference, shared_rows=found.shared_rows).items()
    }
    claims = claims_of(differences, look, margin, waits)
    by_task = {
        task: crossed_tests(
            {label: found.outcomes(label, [task], "score") for label in fit}, reference, shared_rows=found.shared_rows
        )
        for task in found.trained
        if reference in fit
    }
    measures = _measures(families, reference, differences, claims)
    seconds = _seed_seconds(found)
    rows = tuple(
        _row(
            item,
            baseline,
            found,
            {key: measures.get(key, {}).get(item.label) for key in ("score", "nll")},
            claims.get(item.label, {}),
            {task: tests[item.label] for task, tests in by_task.items() if item.label in tests},
            tunings.get(item.label),
            waits[item.label],
            seconds,
        )
        for item in planned
    )
    every = (*found.trained, *found.extra)
    scores = found.base["scores"]["tasks"]
    forgot = forgetting(found.base, {label: found.by_label[label] for label in fit}, reference, found.extra)
    return Summary(
        answer=" ".join(
            filter(
                None,
                (
                    answer(reference, {row.label: claims.get(row.label, {}) for row in rows}),
                    forgetting_words(forgot, reference),
                ),
            )
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
        look=look,
        seed_seconds=seconds,
        device=found.base["device"],
        forgetting=forgot,
        cells=sorted(cell["cell"] for cell in (found.base, *(c for own in found.by_label.values() for c in own))),
    )


def _row(
    item: Competitor,
    baseline: Competitor,
    found: PairedCells,
    measured: Mapping[str, Measure | None],
    claims: Mapping[str, Claim],
    by_task: Mapping[str, Difference],
    tuning: Tuning | None,
    wait: str,
    seconds: float | None,
) -> Row:
    """One method's row of the table."""
    own, diverged = found.by_label[item.label], found.diverged(item.label)
    ratio = item.parameters / baseline.parameters
    said = sentence(item.label, baseline.label, claims, ratio, len(found.seeds), wait, seconds)
    if diverged:
        said = f"{item.label} diverged in {diverged} of {len(own)} trainings; lower its learning rate."
    # of the cells' own scores: those of some of the harness's tasks are no means over rows
    every = {} if diverged else {task: _scores(own, task) for task in (*found.trained, *found.extra)}
    further = [measure.further_seeds for measure in measured.values() if measure and measure.further_seeds is not None]
    verdict = verdict_of(claims)
    return Row(
        label=item.label,
        method=item.name,
        rank=item.rank,
        parameters=item.parameters,
        flops=None if item.flops is None else item.flops.training,
        learning_rate=own[0]["learning_rate"],
        score=measured["score"],
        nll=measured["nll"],
        tasks={task: t_interval(values) for task, values in every.items()},
        task_differences=by_task,
        kept=None if diverged else _kept(own, found.base, found.higher(found.extra)),
        seconds=_interval([cell["seconds"].get("train") for cell in own]),
        memory=_mean([cell["peak_memory_bytes"] for cell in own]),
        latency=_mean([cell["latency"]["extra"] for cell in own if cell["latency"]]),
        sentence=said,
        verdict=verdict,
        further_seeds=min(further) if further and verdict == "undecided" else None,
        tuning=tuning or not_tuned(own[0]["learning_rate"]),
        course=() if diverged else _course(own),
        missing=wait,
    )


def claims_of(
    differences: Mapping[tuple[str, str], Difference],
    look: Look,
    margin: float | None,
    waits: Mapping[str, str],
) -> dict[str, dict[str, Claim]]:
    """Label -> measure -> what may be claimed, all p values corrected together: no winner by chance in any of them."""
    p: dict[tuple[str, str, str], float] = {}
    for (key, label), difference in differences.items():
        if difference.p is None or difference.spread is None:
            continue
        p[key, label, "difference"] = difference.p
        if key == "score" and margin is not None:
            above = difference.interval.mean + margin
            p[key, label, "margin"] = p_value(above, difference.spread) if above > 0 else 1.0
    # a difference cannot be 0 and the margin at once, so the two are one place in the correction
    corrected = dict(zip(p, holm(list(p.values()), [place[:2] for place in p]), strict=True))
    tests = sum(kind == "difference" for _, _, kind in p)
    found: dict[str, dict[str, Claim]] = {}
    for (key, label), difference in differences.items():
        found.setdefault(label, {})[key] = Claim(
            difference.interval,
            corrected.get((key, label, "difference")),
            lower_is_better=key == "nll",
            spread=difference.spread,
            level=look.level,
            tests=max(tests, 1),
            margin=margin if key == "score" else None,
            p_margin=corrected.get((key, label, "margin")),
            tuned=not waits[label],
        )
    return found


def _measures(
    families: Mapping[str, Mapping[str, Mapping[str, Array]]],
    reference: str,
    differences: Mapping[tuple[str, str], Difference],
    claims: Mapping[str, Mapping[str, Claim]],
) -> dict[str, dict[str, Measure]]:
    """Both measures of all methods."""
    found: dict[str, dict[str, Measure]] = {}
    for key, methods in families.items():
        found[key] = {}
        for label, outcomes in methods.items():
            claim, mean = claims.get(label, {}).get(key), macro_by_seed(outcomes)
            if claim is None:
                found[key][label] = Measure(mean=t_interval(mean), difference=None, p=None, over_seeds=None)
                continue
            found[key][label] = Measure(
                mean=t_interval(mean),
                difference=differences[key, label],
                p=claim.p,
                over_seeds=paired_t(mean, macro_by_seed(methods[reference])),
                verdict=claim.verdict,
                p_margin=claim.p_margin,
                detectable=detectable(claim.spread, claim.level / claim.tests)
                if claim.spread is not None and claim.level
                else None,
                further_seeds=claim.further_seeds,
            )
    return found


def _seed_seconds(found: PairedCells) -> float | None:
    """What a seed takes, all methods together, training and scoring."""
    totals = [[sum(cell["seconds"].values()) for cell in own if cell["seconds"]] for own in found.by_label.values()]
    return sum(sum(own) / len(own) for own in totals) if totals and all(totals) else None


def _scores(cells: Sequence[Cell], task: str) -> list[float]:
    """A task's score in each cell."""
    return [cell["scores"]["tasks"][task]["score"] for cell in cells]


def _kept(cells: Sequence[Cell], base: Cell, tasks: Sequence[str]) -> Interval | None:
    """Change of the macro score on tasks that were not trained on."""
    if not tasks:
        return None
    before = np.mean([base["scores"]["tasks"][task]["score"] for task in tasks])
    after = [np.mean([cell["scores"]["tasks"][task]["score"] for task in tasks]) for cell in cells]
    return t_interval([float(value - before) for value in after])


def _course(cells: Sequence[Cell]) -> tuple[tuple[float, Interval], ...]:
    """Macro score over seeds at the shares of the steps where all were scored, and at the end."""
    by_seed = [{point["share"]: point["scores"]["macro"] for point in cell.get("course", ())} for cell in cells]
    shares = sorted(set.intersection(*map(set, by_seed)))
    if not shares or any(points[share] is None for points in by_seed for share in shares):
        return ()
    found = [(share, t_interval([points[share] for points in by_seed])) for share in shares]
    return (*found, (1.0, t_interval([cell["scores"]["macro"] for cell in cells])))


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
