"""Does the verdict hold? Compare methods whose truth is known, thousands of times, and count what users would be told.

    python tools/simulate_verdict.py            # in full, 2,000 comparisons each, and writes the table into
    docs/comparing.md python tools/simulate_verdict.py --quick    # 200 comparisons each, prints

Two kinds of comparisons are drawn. *Made*: rows of a difficulty, answered right or wrong with a probability that
depends on the row, on what the method makes of it, and on the luck of the training; methods differ in how much luck
they have. *Real*: the right and wrong answers of trainings that ran (docs/results/rows), trainings and rows drawn
anew. Every verdict comes from the functions that `multiflora compare` itself uses.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from multiflora.comparison.archive import read_archive
from multiflora.comparison.foresight import LUCK as LUCKS
from multiflora.comparison.foresight import expected_spread
from multiflora.comparison.looks import levels, planned_looks
from multiflora.comparison.power import detectable
from multiflora.comparison.statistics import CLAIM, crossed_tests, holm
from multiflora.comparison.words import Claim

ROOT = Path(__file__).parents[1]
PAGE, ROWS = ROOT / "docs" / "comparing.md", ROOT / "docs" / "results" / "rows" / "cells.json.gz"

Array = npt.NDArray[np.float64]
LUCK = (0.03, 0.2, 0.08, 0.15, 0.05, 0.1, 0.03, 0.2)  # in probits: from .9 to 6.5 points of accuracy


class Set(NamedTuple):
    """One set-up."""

    name: str
    seeds: int
    methods: int
    rows: int
    own: float = 0.0
    """How differently methods see a row, in probits."""
    shared: bool = True
    """Whether all seeds are scored on the same rows."""
    real: bool = False
    looks: tuple[int, ...] = ()


class Found(NamedTuple):
    """What came of a set-up's comparisons."""

    covered: float
    """Share of 95 % intervals that hold the truth."""
    claimed: float
    """Share of comparisons in which any method was called better or worse, though all are equal."""
    zero: int
    """Values of p that are exactly 0."""


SETS = (
    *(Set("unequal luck", s, m, n) for s, m, n in ((2, 2, 50), (3, 2, 400), (3, 5, 200), (5, 8, 200), (10, 2, 400))),
    *(Set("and rows that suit methods", s, m, 200, own=0.5) for s, m in ((2, 2), (3, 5), (5, 8), (10, 3))),
    *(Set("rows drawn anew with each seed", s, m, 200, own=0.5, shared=False) for s, m in ((3, 5), (10, 8))),
    *(Set("one method against itself, real answers", s, 2, 400, real=True) for s in (2, 3, 5)),
    Set("looks at 3, 5, 8 and 10 seeds", 10, 3, 200, looks=planned_looks(3, 10)),
)


def made(generator: np.random.Generator, kind: Set, count: int) -> Iterator[Array]:
    """Comparisons of methods that are all equally good, each (methods, seeds, rows)."""
    luck = np.array(LUCK[: kind.methods])[:, None, None]
    shape = (kind.methods, kind.seeds, kind.rows)
    hard, one = 0.8, 1 if kind.shared else kind.seeds
    # with this, each method's chance to be right, over all rows and trainings, is .7
    level = ndtri(0.7) * np.sqrt(1 + hard**2 + kind.own**2 + luck**2)
    for _ in range(count):
        logit = level + generator.normal(0, hard, (1, one, kind.rows))
        logit = logit + generator.normal(0, 1, (kind.methods, kind.seeds, 1)) * luck
        if kind.own:
            logit = logit + generator.normal(0, kind.own, (kind.methods, one, kind.rows))
        yield (generator.standard_normal(shape) < logit).astype(np.float64)


def real(generator: np.random.Generator, kind: Set, count: int) -> Iterator[Array]:
    """One method's trainings, dealt out as if they were those of two; rows drawn with replacement."""
    _, _, cells, _, _ = read_archive(ROWS)
    by_label: dict[str, list[Array]] = {}
    for cell in cells:
        if cell["kind"] == "seed":
            scores = np.concatenate([np.array(rows["score"], dtype=np.float64) for rows in cell["rows"].values()])
            by_label.setdefault(cell["label"], []).append(scores)
    pools = [np.stack(own) for own in by_label.values()]
    for number in range(count):
        pool = pools[number % len(pools)]
        dealt = generator.permutation(len(pool))[: 2 * kind.seeds].reshape(2, kind.seeds)
        yield pool[dealt][:, :, generator.integers(0, pool.shape[1], kind.rows)]


def verdicts(scores: Array, shared: bool, level: float) -> tuple[list[Claim], int, int]:
    """What users would be told of each method against the first; intervals that hold 0; values of p that are 0."""
    methods = {str(k): {"task": own} for k, own in enumerate(scores)}
    found = crossed_tests(methods, "0", shared_rows=shared)
    p = [difference.p or 0.0 for difference in found.values()]
    claims = [
        Claim(difference.interval, corrected, level=level)
        for difference, corrected in zip(found.values(), holm(p), strict=True)
    ]
    covered = sum((c.interval.low or 0.0) <= 0 <= (c.interval.high or 0.0) for c in claims)
    return claims, covered, sum(value == 0 for value in p)


def simulate(kind: Set, count: int, seed: int = 0) -> Found:
    """Draw a set-up's comparisons and count.

    Args:
        kind: The set-up.
        count: Comparisons.
        seed: Of the draws.
    """
    generator = np.random.default_rng([seed, kind.seeds, kind.methods, kind.rows])
    plan = levels(kind.looks) if kind.looks else {kind.seeds: CLAIM}
    covered = claimed = zero = 0
    for scores in (real if kind.real else made)(generator, kind, count):
        winner = False
        for seeds, level in plan.items():
            claims, held, zeros = verdicts(scores[:, :seeds], kind.shared, level)
            winner |= any(claim.shown for claim in claims)
        claimed += winner
        covered += held  # of the last look
        zero += zeros
    return Found(covered / count / (kind.methods - 1), claimed / count, zero)


def table(sets: Sequence[Set], count: int) -> str:
    """All set-ups, as a table of the page."""
    lines = [
        "| equal methods | methods | seeds | rows | intervals that hold the truth, % | false claims in 100 |",
        "|---|---|---|---|---|---|",
    ]
    for kind in sets:
        found = simulate(kind, count)
        lines.append(
            f"| {kind.name} | {kind.methods} | {kind.seeds} | {kind.rows} | {100 * found.covered:.1f} | "
            f"{100 * found.claimed:.1f} |"
        )
        print(lines[-1], "" if not found.zero else f"p was 0 {found.zero} times", flush=True)
    return "\n".join(lines)


def main() -> None:
    """Simulate, and write the page unless it shall be quick."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="200 comparisons each, nothing is written")
    quick = parser.parse_args().quick
    count = 200 if quick else 2000
    text = table(SETS, count)
    if quick:
        return
    write(text, count)


def write(text: str, count: int) -> None:
    """Put both tables into the page."""
    page = PAGE.read_text("utf-8")
    said = f"{count:,} comparisons each (`python tools/simulate_verdict.py`):\n\n{text}"
    for name, new in (("seen", seen()), ("simulated", said)):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n\n{new}\n\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(page, "utf-8")


def seen() -> str:
    """What can be seen, by seeds and spread, as a table of the page."""
    lines = ["| seeds | " + " | ".join(f"{100 * luck:.1f} points" for luck in LUCKS) + " |", "|---|---|---|---|"]
    for seeds in (3, 5, 8, 10, 20):
        found = [detectable(expected_spread([200] * 4, seeds, luck), CLAIM / 8) for luck in LUCKS]
        lines.append(f"| {seeds} | " + " | ".join(f"{100 * value:.1f}" for value in found) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
