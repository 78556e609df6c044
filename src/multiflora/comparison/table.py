"""A comparison in the terminal: what is planned, and what was found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from multiflora.comparison.search import first_rates
from multiflora.comparison.statistics import Interval
from multiflora.comparison.transfer import SIZES
from multiflora.text_table import TextTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from multiflora.comparison.plan import Competitor
    from multiflora.comparison.results import Measure, Row, Summary
    from multiflora.comparison.spec import Comparison

__all__ = ["plan_dict", "plan_table", "summary_table"]


def plan_dict(planned: Sequence[Competitor]) -> dict[str, Any]:
    """The competitors as plain values, for JSON."""
    return {
        item.label: {
            "method": item.name,
            "rank": item.rank,
            "solved": item.solved,
            "settings": dict(item.settings),
            "parameters": item.parameters,
            "flops_per_training_token": None if item.flops is None else item.flops.training,
        }
        for item in planned
    }


def plan_table(planned: Sequence[Competitor], comparison: Comparison) -> TextTable:
    """The competitors with what they cost; the share is that of the baseline's parameters."""
    spec = comparison.compare
    reference = next(item for item in planned if item.label == spec.reference())
    table = TextTable()
    for header in ("method", "rank", "alpha", "parameters", "share", "flops/token"):
        table.add_column(header, justify="left" if header == "method" else "right", no_wrap=True)
    for item in planned:
        alpha = item.settings.get("lora_alpha")
        table.add_row(
            item.label,
            "–" if item.rank is None else f"{item.rank}{'' if item.solved else ' (given)'}",
            "–" if alpha is None else f"{alpha:g}",
            f"{item.parameters:,}",
            f"{item.parameters / reference.parameters:.3f}",
            "–" if item.flops is None else f"{item.flops.training:,}",
        )
    search = spec.learning_rate
    rates = first_rates(comparison, planned) if search else ()
    # a trial of full length at the best rate is a seed
    shared = search.seeds if search and search.max_steps is None else 0
    each = len(spec.seeds) + len(rates) * (search.seeds if search else 0) - shared
    table.caption = f"{len(planned) * each} trainings: {each} each, with {len(spec.seeds)} seeds"
    if rates:
        table.caption += (
            f"; learning rates {', '.join(f'{rate:.3g}' for rate in rates)}, and more if the best is an end"
        )
    if spec.single_task:
        singles = len(SIZES) * len(comparison.recipe.tasks) * each
        table.caption += f"; and {singles} of single tasks, each a share of the steps"
    return table


def summary_table(summary: Summary) -> TextTable:
    """The methods, best macro score first where there is one, with intervals over seeds."""
    table = TextTable()
    headers = ("method", "rank", "parameters", "macro", "± to baseline", "p", "verdict")
    for header in (*headers, "nats", "train s", "latency", "learning rate"):
        table.add_column(header, justify="left" if header in ("method", "learning rate") else "right", no_wrap=True)
    for row in sorted(summary.rows, key=_order):
        measure = row.score or row.nll
        table.add_row(
            Text(row.label, style="bold" if row.label == summary.reference else ""),
            "–" if row.rank is None else str(row.rank),
            f"{row.parameters:,}",
            _interval(row.score.mean if row.score else None, 100, 1),
            _difference(measure, 100 if row.score else 1, 1 if row.score else 4),
            "–" if measure is None or measure.p is None else f"{measure.p:.3f}",
            "baseline" if row.label == summary.reference else row.verdict,
            _interval(row.nll.mean if row.nll else None, 1, 4),
            "–" if row.seconds is None else f"{row.seconds.mean:.0f}",
            "–" if row.latency is None else f"{row.latency:+.0%}",
            f"{row.learning_rate:.3g}" + ("" if row.tuning is None else f", {row.tuning.state}"),
        )
    return table


def _order(row: Row) -> float:
    if row.score is not None:
        return -row.score.mean.mean
    return row.nll.mean.mean if row.nll is not None else 0.0


def _interval(interval: Interval | None, factor: float, digits: int) -> str:
    if interval is None:
        return "–"
    mean = f"{interval.mean * factor:.{digits}f}"
    if interval.high is None:
        return mean
    return f"{mean} ±{(interval.high - interval.mean) * factor:.{digits}f}"


def _difference(measure: Measure | None, factor: float, digits: int) -> str:
    if measure is None or measure.difference is None:
        return "–"
    low, high = measure.difference.interval.low, measure.difference.interval.high
    mean = f"{measure.difference.interval.mean * factor:+.{digits}f}"
    return mean if low is None or high is None else f"{mean} [{low * factor:+.{digits}f}, {high * factor:+.{digits}f}]"
