"""Write what was measured into docs/choosing.md, from the summary of a comparison. Nothing there is typed by hand.

    python tools/choosing.py runs/comparison/summary.json
    python tools/choosing.py runs/relatives/summary.json relatives

The text between the page's two marks of that name ("measured" where none is given) is replaced. Every claim follows
from the summary's own tests: a method is called better only where `multiflora compare` called it so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from multiflora.comparison.statistics import CLAIM
from multiflora.methods import METHODS

PAGE = Path(__file__).parents[1] / "docs" / "choosing.md"
BEGIN, END = "<!-- {}: begin -->", "<!-- {}: end -->"

Json = Mapping[str, Any]


def measured(summary: Json) -> str:
    """The section: the finding, the table, a sentence for each method, and what each cost."""
    return "\n\n".join(part for part in (*_finding(summary), _table(summary), *_told(summary)) if part)


def _finding(summary: Json) -> Iterator[str]:
    yield f"**{summary['answer']}**"
    better, worse = shown(summary, 1), shown(summary, -1)
    base = next(row for row in summary["rows"] if row["label"] == summary["reference"])
    if len(summary["rows"]) < 2 or len(summary["seeds"]) < 2:
        yield "That is not enough to choose by: it takes at least two methods and two seeds."
    elif better:
        best = max(better, key=lambda row: row["score"]["mean"]["mean"])
        low, high = (100 * best["score"]["difference"]["interval"][end] for end in ("low", "high"))
        yield f"By this, start with **{title(best)}**: better than {title(base)} by {low:.1f} to {high:.1f} points."
    else:
        less = f" {listed([title(row) for row in worse])} did worse." if worse else ""
        # a budget is told as a number of parameters or operations, or in words that there was none
        equal = " at equal cost" if summary["budget"][0].isdigit() else ""
        yield (
            f"By this, start with **{title(base)}**: nothing was shown to be better{equal}.{less} Choose "
            "another method for what it can do and this one cannot, by the table above, and not for its score."
        )


def _table(summary: Json) -> str:
    header = f"method | rank | parameters | macro score, % | difference to {summary['reference']}, points | p | nats"
    rows = [f"| {header} per token | merges |", "|" + "---|" * 8]
    for row in sorted(summary["rows"], key=lambda row: -_mean(row["score"])):
        score, nll = row["score"] or {}, row["nll"] or {}
        difference = score.get("difference") or {}
        cells = (
            row["label"],
            f"{row['rank'] or '–'}",
            f"{row['parameters']:,}",
            _interval(score.get("mean"), 100, 1),
            _interval(difference.get("interval"), 100, 1, sign="+"),
            _p(score.get("p")),
            _interval(nll.get("mean"), 1, 3),
            METHODS[row["method"]].merges,
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _told(summary: Json) -> Iterator[str]:
    tasks = listed([f"{name} ({summary['counts'][name]} rows)" for name in summary["counts"]])
    yield (
        f"Seeds {', '.join(map(str, summary['seeds']))} of each; budget: {summary['budget']}; tasks: {tasks}; on "
        f"{summary['device']}. In brackets, 95 % intervals; p is corrected for all methods and both measures."
    )
    yield "\n".join(f"- {row['sentence']}" for row in summary["rows"])
    yield "\n".join(_costs(summary))


def _costs(summary: Json) -> Iterator[str]:
    """Time, memory and latency beside the reference's; a difference in time only where the intervals are apart."""
    base = next(row for row in summary["rows"] if row["label"] == summary["reference"])
    for row in summary["rows"]:
        if row is base or not row["seconds"] or not base["seconds"]:
            continue
        parts = [f"{row['seconds']['mean'] / base['seconds']['mean']:.2f} times the training time{_apart(row, base)}"]
        if row["memory"] and base["memory"]:
            parts.append(f"{row['memory'] / base['memory']:.2f} times the memory")
        if row["latency"] is not None and base["latency"] is not None:
            parts.append(
                f"a forward pass of one row took {row['latency']:.0%} longer than without an adapter "
                f"({summary['reference']}: {base['latency']:.0%})"
            )
        yield f"- {row['label']} took {listed(parts)}."


def _apart(row: Json, base: Json) -> str:
    ours, theirs = row["seconds"], base["seconds"]
    if ours["low"] is None or theirs["low"] is None:
        return " (one training each)"
    return "" if ours["low"] > theirs["high"] or ours["high"] < theirs["low"] else " (intervals overlap)"


def shown(summary: Json, sign: int) -> list[Json]:
    """The methods whose macro score was shown to be better (1) or worse (-1) than the reference's."""
    found = []
    for row in summary["rows"]:
        score = row["score"]
        if score is None or score["difference"] is None or score["p"] is None or score["p"] >= CLAIM:
            continue
        if score["difference"]["interval"]["mean"] * sign > 0:
            found.append(row)
    return found


def title(row: Json) -> str:
    """What a method is called in a sentence."""
    name = METHODS[row["method"]].title
    return name if row["label"] == row["method"] else f"{name} ({row['label']})"


def listed(words: list[str]) -> str:
    """One, two and three."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _mean(measure: Json | None) -> float:
    return float(measure["mean"]["mean"]) if measure else float("-inf")


def _interval(value: Json | None, factor: float, digits: int, sign: str = "") -> str:
    if not value:
        return "–"
    mean = f"{value['mean'] * factor:{sign}.{digits}f}"
    if value["low"] is None:
        return mean
    return f"{mean} ({value['low'] * factor:.{digits}f} to {value['high'] * factor:.{digits}f})"


def _p(p: float | None) -> str:
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def put(page: str, text: str, name: str = "measured") -> str:
    """The page with its section of that name replaced."""
    begin, end = BEGIN.format(name), END.format(name)
    if begin not in page or end not in page:
        raise SystemExit(f"{PAGE} has no place for {name!r}: expected the marks {begin} and {end}.")
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def main(summary: Path, name: str = "measured") -> None:
    """Rewrite the page."""
    text = measured(json.loads(summary.read_text("utf-8")))
    PAGE.write_text(put(PAGE.read_text("utf-8"), text, name), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
