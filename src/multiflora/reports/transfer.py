"""Tables of what training together brings, and of what it makes a model forget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from multiflora.comparison.forgetting import Forgetting
from multiflora.comparison.results import Summary
from multiflora.comparison.statistics import Difference, Interval
from multiflora.comparison.transfer import Transfer
from multiflora.reports.comparison_tables import scale_of as _scale
from multiflora.reports.tables import NOTHING, Cell, Column, Table, difference, interval, number, p_value, word

__all__ = ["forgetting_table", "transfer_tables"]

_METHOD = Column("Method", ("method",), numeric=False)
_SIZES = {"each": "the whole budget each", "together": "the budget together"}


def transfer_tables(summary: Summary) -> Iterator[Table]:
    """Δm, the tasks that do worse together, and the matrix where it was asked for; a set for each size of LoRA."""
    for found in summary.single_task:
        yield _gains(found)
        yield _tasks(found, summary)
        if found.matrix:
            yield _matrix(found, summary)


def _gains(found: Transfer) -> Table:
    return Table(
        name=f"table-delta-m-{found.size}",
        title=f"Against one LoRA per task: {_SIZES[found.size]}",
        reading=f"Mean relative gain over the single-task LoRAs (Δm), over seeds. Theirs have rank {found.rank} and "
        f"{found.parameters:,} parameters in all; each took its task's share of the steps{_rate(found)}. p is "
        "corrected for all methods. A method without a number stands beside a LoRA that scored 0."
        + "".join(f" Nothing is said of {label} yet: {why}." for label, why in found.missing.items()),
        columns=[_METHOD, Column("Δm, %", ("delta_m", "delta_m_low", "delta_m_high")), Column("p, corrected", ("p",))],
        rows=[
            [word(label), difference(own.interval, 0, 1, factor=100), p_value(found.p[label])]
            if (own := found.delta_m.get(label))
            else [word(label), NOTHING, NOTHING]
            for label in found.tasks
        ],
    )


def _rate(found: Transfer) -> str:
    """Their learning rate, and whether it is tuned."""
    return "" if found.tuning is None else f", with a learning rate of {found.tuning.chosen:.3g} ({found.tuning.state})"


def _tasks(found: Transfer, summary: Summary) -> Table:
    return Table(
        name=f"table-transfer-{found.size}",
        title=f"Negative transfer, against LoRAs of {_SIZES[found.size]}",
        reading="Each task's own metric, together minus alone. A mark (▼) stands where the task does worse together "
        "beyond chance: p, corrected for all methods and tasks.",
        columns=[
            _METHOD,
            *(Column(task, (task, f"{task}_low", f"{task}_high", f"{task}_p_corrected")) for task in found.scores),
        ],
        rows=[
            [word("alone"), *(_interval(summary, task, own) for task, own in found.scores.items())],
            *(
                [word(label), *(_together(found, summary, label, task, own) for task, own in tasks.items())]
                for label, tasks in found.tasks.items()
            ),
        ],
    )


def _together(found: Transfer, summary: Summary, label: str, task: str, own: Difference) -> Cell:
    """One method's difference in one task, marked where it is negative transfer."""
    digits, factor = _scale(summary, task)
    cell = difference(own.interval, -1 if task in found.negative[label] else 0, digits, factor=factor)
    return replace(cell, values=(*cell.values, found.p_tasks[label][task]))


def _interval(summary: Summary, task: str, own: Interval) -> Cell:
    digits, factor = _scale(summary, task)
    return interval(own, digits, factor=factor)


def _matrix(found: Transfer, summary: Summary) -> Table:
    return Table(
        name=f"table-matrix-{found.size}",
        title=f"What transfers, LoRAs of {_SIZES[found.size]}",
        reading="Each row is a LoRA trained on one task; the columns are its gains over the untrained model on every "
        "task, in its own metric (points of 100, nats where lower is better), mean over seeds.",
        columns=[Column("Trained on", ("trained_on",), numeric=False), *(Column(on, (on,)) for on in found.matrix)],
        rows=[
            [
                word(of),
                *(
                    number(gain, _scale(summary, on)[0], factor=_scale(summary, on)[1], signed=True)
                    for on, gain in gains.items()
                ),
            ]
            for of, gains in found.matrix.items()
        ],
    )


def forgetting_table(summary: Summary) -> Iterator[Table]:
    """What became of tasks that were not trained on; no table where there are none."""
    found: Forgetting | None = summary.forgetting
    if found is None:
        return
    yield Table(
        name="table-forgetting",
        title="Tasks not trained on",
        reading=f"Macro score on {', '.join(found.tasks)}, in points of 100: change from the untrained model (below 0 "
        f"is forgetting), and the difference of that change to {summary.reference}'s, paired over seeds and rows. A "
        "mark stands where it was shown; p is corrected for all methods.",
        columns=[
            _METHOD,
            Column("Change", ("change", "change_low", "change_high")),
            Column(f"Difference to {summary.reference}", ("difference", "difference_low", "difference_high")),
            Column("p, corrected", ("p",)),
        ],
        rows=[
            [
                word(label),
                interval(change, signed=True),
                difference(own.interval, found.shown(label), 1, factor=100)
                if (own := found.differences.get(label))
                else NOTHING,
                p_value(found.p.get(label)),
            ]
            for label, change in found.changes.items()
        ],
    )
