"""Whether every method was tuned: score and loss against learning rate, which is what to look at first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from statistics import fmean

from multiflora.analysis.plots import Drawing, over_rates
from multiflora.comparison.results import Summary
from multiflora.comparison.tuning import Trial, Tuning
from multiflora.reports.page import Section
from multiflora.reports.tables import Cell, Column, Table, number, word

__all__ = ["tuning_section"]

_READING = (
    "On the validation rows. One line for each method, through the means over seeds; every dot is a training, and the "
    "ring is the rate that was chosen. A method is tuned if its line falls off on both sides of the ring."
)


def tuning_section(summary: Summary) -> Section:
    """The search for learning rates; empty where there was none."""
    found = {row.label: row.tuning for row in summary.rows if row.tuning is not None and row.tuning.tried}
    if not found:
        return Section(name="tuning", title="Learning rates")
    steps = {tuning.max_steps for tuning in found.values()} - {None}
    text = [
        "Every method was tried with the same learning rates, as often as any other; the macro score on the validation "
        "rows decided, and the loss among scores within one standard error of the best."
    ]
    if steps:
        text.append(
            f"These trials were shorter than the comparison's trainings: {min(s for s in steps if s)} steps. The best "
            "rate of a short training may be too high for a long one."
        )
    return Section(
        name="tuning", title="Learning rates", text=text, figures=list(_figures(found)), tables=[_table(found)]
    )


def _figures(found: Mapping[str, Tuning]) -> Iterator[Drawing]:
    measures: dict[str, tuple[str, str, Callable[[Trial], float | None]]] = {
        "score": ("Score against learning rate", "points of 100", lambda t: None if t.score is None else 100 * t.score),
        "loss": ("Loss against learning rate", "nats per token, less is better", lambda trial: trial.loss),
    }
    for key, (title, y, of) in measures.items():
        dots = {
            label: [(trial.rate, value) for trial in tuning.tried if (value := of(trial)) is not None]
            for label, tuning in found.items()
        }
        dots = {label: own for label, own in dots.items() if own}
        if dots:
            yield over_rates(
                f"rates-{key}",
                title,
                _READING,
                dots,
                chosen={label: found[label].chosen for label in dots},
                y=y,
                alt=f"{title}. " + "; ".join(f"{label}: {_told(own)}" for label, own in dots.items()) + ".",
            )


def _told(own: list[tuple[float, float]]) -> str:
    """The line's points in words."""
    rates = dict.fromkeys(rate for rate, _ in own)
    return ", ".join(f"{fmean(y for x, y in own if x == rate):.3g} at {rate:.3g}" for rate in rates)


def _table(found: Mapping[str, Tuning]) -> Table:
    return Table(
        name="table-trials",
        title="Learning rates that were tried",
        reading="One line for each training of the search. No score and no loss: it diverged.",
        columns=[
            Column("Method", ("method",), numeric=False),
            Column("Learning rate", ("learning_rate",)),
            Column("Seed", ("seed",)),
            Column("Macro score", ("score",)),
            Column("Loss", ("loss",)),
            Column("Found", ("found",), numeric=False),
        ],
        rows=[
            [
                word(label),
                Cell(f"{trial.rate:.3g}", (trial.rate,)),
                number(trial.seed),
                number(trial.score, 1, factor=100),
                number(trial.loss, 4),
                word(tuning.state if trial.rate == tuning.chosen else ""),
            ]
            for label, tuning in found.items()
            for trial in tuning.tried
        ],
    )
