r"""How often one may look: a comparison that goes on until it is decided, without finding winners among equals.

Whoever adds seeds until p is small enough finds a winner in the end, true or not. So the looks are planned with the
comparison, and the level is spent over them. With the number of seeds over the largest number for t, the level that may
have been spent by then is O'Brien and Fleming's in the form of Lan and DeMets (1983, Biometrika 70:659-663),

.. math:: \alpha(t) = 2 - 2\,\Phi\!\left(z_{1-\alpha/2} / \sqrt t\right), \qquad \alpha(1) = \alpha

and a look may spend what has come free since the one before. The levels add up to alpha, so the chance of a false
claim in any look is at most alpha whatever the looks have in common (Bonferroni). It spends little while the seeds
are few and tell little, and leaves most for the last look.

Seeds that are added to a comparison that was planned to end are looks, too: these share a reserve, half of what is left
of it each. What was spent is written down beside the cells, in ``looks.json``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from math import ceil, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from scipy import stats

from multiflora.comparison.statistics import CLAIM
from multiflora.files import write_json

if TYPE_CHECKING:
    from multiflora.comparison.results import Summary

__all__ = ["LOOKS", "RESERVE", "Look", "goes_on", "levels", "look_at", "planned_looks", "read_looks", "record_look"]

log = logging.getLogger(__name__)

LOOKS = "looks.json"
"""File of a comparison: the looks that were taken."""

RESERVE = 0.005
"""What all looks that were not planned may spend together."""


class Look(NamedTuple):
    """One look at the numbers, and what it may claim."""

    seeds: int
    level: float
    """A claim needs a corrected p below this; 0: no claim, as the seeds of the next look are not all there."""
    planned: tuple[int, ...]
    """Numbers of seeds of all planned looks."""
    extra: bool = False
    """Whether it was not planned, and spends from the reserve."""


def planned_looks(first: int, most: int) -> tuple[int, ...]:
    """Numbers of seeds to look at: from the first on, half as many more each time, up to the most.

    Example:
        >>> planned_looks(3, 10), planned_looks(5, 5)
        ((3, 5, 8, 10), (5,))
    """
    found = [first]
    while found[-1] < most:
        found.append(min(ceil(1.5 * found[-1]), most))
    return tuple(found)


def levels(planned: Sequence[int]) -> dict[int, float]:
    """Each planned look's level; see the module's formula.

    Example:
        >>> {seeds: round(level, 4) for seeds, level in levels((3, 5, 8, 10)).items()}
        {3: 0.0, 5: 0.001, 8: 0.0083, 10: 0.0107}
    """
    z = float(stats.norm.isf(CLAIM / 2))
    spent = [0.0, *(float(2 * stats.norm.sf(z / sqrt(seeds / planned[-1]))) for seeds in planned)]
    return {seeds: spent[k + 1] - spent[k] for k, seeds in enumerate(planned)}


def look_at(seeds: Collection[int], planned: Sequence[int], taken: Sequence[Mapping[str, Any]] = ()) -> Look:
    """Say what a look at these seeds may claim.

    Args:
        seeds: Those that all methods have finished.
        planned: Numbers of seeds of the planned looks.
        taken: The looks that were taken before, as `read_looks` returns them.

    Example:
        >>> look_at([0, 1, 2], (3,)).level
        0.02
        >>> look_at([0, 1, 2, 3], (4,), [{"seeds": [0, 1, 2], "level": 0.02, "extra": False}]).level
        0.0025
    """
    now, plan = sorted(seeds), levels(planned)
    number = len(now)
    if number not in plan:
        return Look(number, 0.0, tuple(planned))
    for look in taken:
        if look["seeds"] == now:  # the same numbers once more
            return Look(number, look["level"], tuple(planned), look["extra"])
    foreseen = all(
        not look["extra"]
        and set(look["seeds"]) < set(now)
        and abs(plan.get(len(look["seeds"]), 0.0) - look["level"]) < 1e-9
        for look in taken
    )
    if foreseen:
        return Look(number, plan[number], tuple(planned))
    return Look(number, RESERVE / 2 ** (1 + sum(look["extra"] for look in taken)), tuple(planned), True)


def read_looks(folder: Path, cells: Collection[str]) -> list[dict[str, Any]]:
    """The looks taken at a comparison of which these cells are a part; none of an earlier recipe in the same folder."""
    return [look for look in _every(folder) if set(look["cells"]) & set(cells)]


def record_look(folder: Path, look: Look, seeds: Collection[int], cells: Collection[str]) -> None:
    """Write a look down, once; a look that may claim nothing is none."""
    if not look.level or any(old["seeds"] == sorted(seeds) for old in read_looks(folder, cells)):
        return
    mine = {"seeds": sorted(seeds), "level": look.level, "extra": look.extra, "cells": sorted(cells)}
    write_json(folder / LOOKS, [*_every(folder), mine])


def goes_on(summary: Summary, hours: float, most: float | None) -> bool:
    """Whether more seeds are worth training: a method is undecided that seeds can decide, and there is time.

    Args:
        summary: What was found so far.
        hours: How long it took.
        most: How long it may take before no more seeds are begun; None: as long as it needs.
    """
    open_ = [row.label for row in summary.rows if row.label != summary.reference and row.verdict == "undecided"]
    waits = [row.label for row in summary.rows if row.missing]
    if not open_ or all(label in waits for label in open_):
        return False
    if most is not None and hours >= most:
        log.info("%g hours are over; %s stay undecided with %d seeds", most, ", ".join(open_), len(summary.seeds))
        return False
    log.info("undecided with %d seeds: %s", len(summary.seeds), ", ".join(open_))
    return True


def _every(folder: Path) -> list[dict[str, Any]]:
    path = folder / LOOKS
    found: list[dict[str, Any]] = json.loads(path.read_text("utf-8")) if path.is_file() else []
    return found
