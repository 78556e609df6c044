"""The verdicts on a screen, and for another program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from multiflora.bench.results import Results
from multiflora.bench.verdict import Verdict, verdicts

if TYPE_CHECKING:
    from multiflora.text_table import TextTable

__all__ = ["cells", "verdict_dicts", "verdict_table"]

HEADER = ("target", "wanted", "middle case", "worst case", "its floor", "verdict")


def cells(verdict: Verdict) -> tuple[str, ...]:
    """One row of the table, see `HEADER`."""
    worst, middle = verdict.worst, verdict.middle
    if worst is None or middle is None:
        why = " (no GPU)" if verdict.target.needs_gpu else ""
        return verdict.target.name, verdict.target.bound, "", "", "", verdict.word + why
    digits = 4 if verdict.target.limit < 0.1 else 2
    value, low, high = (f"{number:.{digits}f}" for number in worst.estimate)
    spread = value if low == high else f"{value} ({low} to {high})"
    counts = {
        "out of reach": len(set(verdict.out_of_reach) - set(verdict.held)),
        "too close to tell": len(verdict.undecided),
    }
    notes = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    word = f"{verdict.word} ({notes})" if notes else verdict.word
    floor = "" if worst.floor is None else f"{worst.floor:.2f}"
    return verdict.target.name, verdict.target.bound, f"{middle:.{digits}f}", spread, floor, word


def verdict_table(results: Results) -> TextTable:
    """All targets as a rich table."""
    from multiflora.text_table import TextTable

    machine = results.machine
    title = f"{machine.device}, {machine.threads} thread{'s' * (machine.threads != 1)}, {results.clock} clock"
    table = TextTable(title=title)
    for name in HEADER:
        table.add_column(name, justify="left" if name in ("target", "verdict") else "right")
    for verdict in verdicts(results):
        colour = {"held": "green", "not measured": "dim"}.get(verdict.word, "yellow" if verdict.held else "red")
        *row, word = cells(verdict)
        table.add_row(*row, f"[{colour}]{word}[/]")
    return table


def verdict_dicts(results: Results) -> list[dict[str, Any]]:
    """All targets and their cases as plain values."""
    return [
        {
            "target": verdict.target.name,
            "wanted": verdict.target.bound,
            "verdict": verdict.word,
            "cases": [
                {
                    "case": line.case,
                    "ratio": line.estimate.value,
                    "quartiles": [line.estimate.low, line.estimate.high],
                    "wall": None if line.wall is None else line.wall.value,
                    "floor": line.floor,
                    "held": verdict.target.held(line.estimate.value),
                    "undecided": line in verdict.undecided,
                }
                for line in verdict.lines
            ],
        }
        for verdict in verdicts(results)
    ]
