r"""What tasks gain or lose by being trained together, against one LoRA for each of them. Pure functions on cells.

.. math:: \Delta_m = \frac1T \sum_t (-1)^{l_t}\, \frac{M_{m,t} - M_{b,t}}{M_{b,t}}

is method m's mean relative gain over the single-task models b, with :math:`l_t` 1 where lower is better (Maninis,
Radosavovic and Kokkinos 2019, arXiv:1904.08918, equation 3); it is taken for each seed, and tested over seeds.
A task whose score is lower than alone, beyond chance, suffers negative transfer; these tests are paired over seeds and
rows and corrected for all methods and tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from multiflora.comparison.forgetting import corrected, listed
from multiflora.comparison.paired import Cell, outcomes_of, share_rows
from multiflora.comparison.statistics import CLAIM, Difference, Interval, crossed_tests, paired_t, t_interval
from multiflora.comparison.tuning import Tuning
from multiflora.evaluation.results import LOWER_IS_BETTER

__all__ = ["SIZES", "Transfer", "delta_m", "size_words", "transfer_of", "transfer_words"]

SIZES = ("each", "together")
"""The budget for each task's LoRA, or for all of them together."""


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """A comparison's methods against single-task LoRAs of one size."""

    size: str
    """``each``: every task's LoRA has the budget; ``together``: all of them have."""
    rank: int | None
    parameters: int
    """Of all the tasks' LoRAs together."""
    scores: Mapping[str, Interval]
    """Task -> the single-task LoRA's own metric, over seeds."""
    delta_m: Mapping[str, Difference]
    """Label -> mean relative gain over the single-task LoRAs; without a label where one of them scored 0."""
    p: Mapping[str, float | None]
    """Label -> its p, corrected for all methods."""
    tasks: Mapping[str, Mapping[str, Difference]]
    """Label -> task -> its own metric together minus alone."""
    p_tasks: Mapping[str, Mapping[str, float | None]]
    """Label -> task -> p of that difference, corrected for all methods and tasks."""
    negative: Mapping[str, tuple[str, ...]]
    """Label -> the tasks that do worse together than alone, beyond chance; none where a verdict waits."""
    matrix: Mapping[str, Mapping[str, float]]
    """Task trained on -> task scored on -> gain over the untrained model, mean over seeds; empty if not asked for."""
    tuning: Tuning | None = None
    """Whether their learning rate is tuned, and what was tried; None in a summary from before they were."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Label -> what a verdict waits for; empty where the method and the single-task LoRAs are tuned."""


def delta_m(together: Mapping[str, float], alone: Mapping[str, float], lower: Sequence[str] = ()) -> float | None:
    """Return the mean relative gain over single-task models; None where one of them scored 0.

    Args:
        together: Task -> score of the multi-task model.
        alone: Task -> score of the task's own model.
        lower: Tasks where lower is better.

    Example:
        >>> round(delta_m({"a": 0.6, "b": 1.0}, {"a": 0.5, "b": 2.0}, lower=["b"]), 6)
        0.35
    """
    if any(value == 0 for value in alone.values()):
        return None
    gains = [(-1 if task in lower else 1) * (together[task] - own) / own for task, own in alone.items()]
    return sum(gains) / len(gains)


def transfer_of(
    size: str,
    by_label: Mapping[str, Sequence[Cell]],
    single: Mapping[str, Sequence[Cell]],
    base: Cell,
    *,
    rank: int | None,
    parameters: int,
    matrix: bool,
    tuning: Tuning | None = None,
    missing: Mapping[str, str] | None = None,
) -> Transfer:
    """Compare methods with single-task LoRAs.

    Args:
        size: Their size, in a word.
        by_label: Method -> its cells, seed by seed.
        single: Task -> its LoRA's cells, the same seeds.
        base: The untrained model's cell.
        rank: Of each LoRA.
        parameters: Of all of them together.
        matrix: Whether each was scored on every task.
        tuning: How well their learning rate is known.
        missing: Label -> what a verdict waits for, see
            `multiflora.comparison.tuning.waits_for`; nothing is claimed of it.
    """
    tasks = list(single)
    lower = [task for task in tasks if base["scores"]["tasks"][task]["metric"] in LOWER_IS_BETTER]
    alone = {task: [_score(cell, task) for cell in cells] for task, cells in single.items()}
    gains = {label: _gains(cells, alone, lower) for label, cells in by_label.items()}
    tested = {label: paired_t(own, [0.0] * len(own)) for label, own in gains.items() if own is not None}
    differences = {
        (label, task): crossed_tests(
            {"alone": outcomes_of(single[task], [task]), label + " together": outcomes_of(cells, [task])},
            "alone",
            shared_rows=share_rows(cells, [task]),
        )[label + " together"]
        for label, cells in by_label.items()
        for task in tasks
    }
    p_tasks = corrected({f"{label}\n{task}": found for (label, task), found in differences.items()})
    waits = {label: why for label, why in (missing or {}).items() if why}
    worse = {
        (label, task)
        for (label, task), found in differences.items()
        if (p := p_tasks[f"{label}\n{task}"]) is not None
        and p < CLAIM
        and label not in waits
        and found.interval.mean * (-1 if task in lower else 1) < 0
    }
    return Transfer(
        size=size,
        rank=rank,
        parameters=parameters,
        scores={task: t_interval(values) for task, values in alone.items()},
        delta_m=tested,
        p=corrected(tested),
        tasks={label: {task: differences[label, task] for task in tasks} for label in by_label},
        p_tasks={label: {task: p_tasks[f"{label}\n{task}"] for task in tasks} for label in by_label},
        negative={label: tuple(task for task in tasks if (label, task) in worse) for label in by_label},
        matrix={
            of: {on: float(np.mean([_score(cell, on) for cell in cells])) - _score(base, on) for on in tasks}
            for of, cells in single.items()
        }
        if matrix
        else {},
        tuning=tuning,
        missing=waits,
    )


def size_words(size: str) -> str:
    """A size in words."""
    return "of the whole budget each" if size == "each" else "that share the budget"


def _score(cell: Cell, task: str) -> float:
    return float(cell["scores"]["tasks"][task]["score"])


def _gains(cells: Sequence[Cell], alone: Mapping[str, Sequence[float]], lower: Sequence[str]) -> list[float] | None:
    """The mean relative gain of each seed; None where one cannot be taken."""
    found = [
        delta_m({task: _score(cell, task) for task in alone}, {task: own[k] for task, own in alone.items()}, lower)
        for k, cell in enumerate(cells)
    ]
    known = [gain for gain in found if gain is not None]
    return known if len(known) == len(found) else None


def transfer_words(found: Sequence[Transfer]) -> str:
    """Say what training together brought, a sentence or two for each size; nothing where there is nothing to say."""
    told = []
    for each in found:
        size = size_words(each.size)
        shown, open_ = [], []
        for label, difference in each.delta_m.items():
            if label in each.missing:
                continue
            p, mean = each.p[label], difference.interval.mean
            if p is None or p >= CLAIM or mean == 0:
                open_.append(f"{label} ({mean:+.1%})")
            else:
                shown.append(f"{label} {'gained' if mean > 0 else 'lost'} {abs(mean):.1%}")
        if open_:
            shown.append(f"no gain or loss could be shown for {listed(open_)}")
        if shown:
            told.append(f"Against one LoRA per task {size}, on average over tasks (Δm): {'; '.join(shown)}.")
        if each.missing:
            # one reason and one command: the others wait for the same search
            told.append(
                f"Nothing is said of {listed(list(each.missing))} against one LoRA per task {size} yet: "
                f"{next(iter(each.missing.values()))}."
            )
        suffering = [f"{listed(tasks)} with {label}" for label, tasks in each.negative.items() if tasks]
        if suffering:
            told.append(f"Tasks that do worse together than alone: {'; '.join(suffering)}.")
    return " ".join(told)
