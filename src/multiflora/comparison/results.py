"""What a comparison found, as values: ready for a table, a page, or JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from multiflora.comparison.forgetting import Forgetting
from multiflora.comparison.looks import Look
from multiflora.comparison.statistics import Difference, Interval
from multiflora.comparison.transfer import Transfer
from multiflora.comparison.tuning import Tuning
from multiflora.comparison.words import Verdict

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Measure", "Row", "Summary"]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One measure of one method: the macro score, or nats per token."""

    mean: Interval
    """Over seeds."""
    difference: Difference | None
    """To the baseline, over seeds and rows; None for the baseline itself."""
    p: float | None
    """The difference's p, corrected for all methods and measures of the comparison."""
    over_seeds: Difference | None
    """The plain paired t-test over seeds, which speaks of these rows only."""
    verdict: Verdict = "undecided"
    """What may be said of it against the baseline; of the baseline itself, nothing."""
    p_margin: float | None = None
    """Corrected p of "worse by the margin or more"; None where there is no margin."""
    detectable: float | None = None
    """The true difference that would be found four times out of five by the rule that was used."""
    further_seeds: int | None = None
    """Further seeds that would decide it, were the difference as it looks now; None: decided, or none up to 100."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method of the table."""

    label: str
    method: str
    rank: int | None
    parameters: int
    flops: int | None
    """Operations that it adds to a training token."""
    learning_rate: float
    score: Measure | None
    """Macro score of the tasks where higher is better; None where there are none."""
    nll: Measure | None
    """Nats per token of the right completions, mean over the tasks that have them."""
    tasks: Mapping[str, Interval]
    """Task -> its own metric over seeds."""
    task_differences: Mapping[str, Difference]
    """Task -> difference to the baseline. Exploratory: p is corrected for nothing."""
    kept: Interval | None
    """Macro score on tasks that were not trained on, minus the untrained model's: below 0 is forgetting."""
    seconds: Interval | None
    """Training time."""
    memory: float | None
    """Bytes at the highest, mean over seeds."""
    latency: float | None
    """Share of time that the adapter adds to a forward pass of one row, mean over seeds."""
    sentence: str
    tuning: Tuning | None = None
    """Whether its learning rate is tuned, and what was tried; None in a summary from before there was a grid."""
    course: tuple[tuple[float, Interval], ...] = ()
    """Share of the steps -> macro score over seeds, up to the whole training; empty without ``evaluate.during``."""
    verdict: Verdict = "undecided"
    """Of all measures together: the score's, or that of the nats where the score has none."""
    further_seeds: int | None = None
    """Further seeds that would decide it, by the measure that takes fewer."""
    missing: str = ""
    """What a verdict on it waits for; empty where it and the baseline are tuned."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a comparison found."""

    answer: str
    """The finding in one or two sentences."""
    rows: tuple[Row, ...]
    reference: str
    """Label of the method that the others are tested against."""
    seeds: tuple[int, ...]
    budget: str
    """What was equal, in words."""
    metrics: Mapping[str, str]
    """Task -> the metric of its score."""
    counts: Mapping[str, int]
    """Task -> its test rows."""
    extra: tuple[str, ...]
    """Tasks that are scored but were not trained on, those of the harness among them."""
    base: Mapping[str, float]
    """Task -> the untrained model's score."""
    curves: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]
    """Label -> task -> (step, loss) pairs of the first seed."""
    device: str
    look: Look | None = None
    """Which look at the numbers this is, and what it may claim; None in a summary from before looks were counted."""
    seed_seconds: float | None = None
    """What one more seed costs for all methods together: training and scoring."""
    cells: Sequence[str]
    """Names of the cells that all this is made of."""
    forgetting: Forgetting | None = None
    """What became of the tasks that were not trained on; None where there are none."""
    single_task: tuple[Transfer, ...] = ()
    """Every method against one LoRA per task, for each of their sizes; empty where it was not asked for."""

    @property
    def sentences(self) -> dict[str, str]:
        """Label -> what can be said of it."""
        return {row.label: row.sentence for row in self.rows}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        plain: dict[str, Any] = _plain(self)
        return plain

    def table(self) -> Table:
        """The methods with their intervals, as a rich table."""
        from multiflora.comparison.table import summary_table

        return summary_table(self)


def _plain(value: Any) -> Any:
    """Dataclasses and named tuples as mappings, all the way down."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {key: _plain(item) for key, item in value._asdict().items()}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
