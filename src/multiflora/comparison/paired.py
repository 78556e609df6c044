"""The cells that can be compared: of the same seeds, scored on the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from multiflora.comparison.plan import Competitor
from multiflora.comparison.spec import Comparison
from multiflora.comparison.statistics import Outcomes
from multiflora.errors import DataError
from multiflora.evaluation.results import LOWER_IS_BETTER

__all__ = ["Cell", "PairedCells", "arrange", "outcomes_of", "share_rows"]

Cell: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class PairedCells:
    """Finished cells, in order, and what their tasks can be measured by."""

    base: Cell
    by_label: Mapping[str, Sequence[Cell]]
    seeds: tuple[int, ...]
    trained: Sequence[str]
    extra: Sequence[str]
    shared_rows: bool
    """Whether all seeds were scored on the same rows, or each on rows of its own."""

    def metric(self, task: str) -> str:
        """Name of a task's metric."""
        name: str = self.base["scores"]["tasks"][task]["metric"]
        return name

    def higher(self, tasks: Sequence[str]) -> list[str]:
        """The tasks where a higher score is better."""
        return [task for task in tasks if self.metric(task) not in LOWER_IS_BETTER]

    def with_nll(self) -> list[str]:
        """The trained tasks whose right completions have a probability."""
        return [task for task in self.trained if None not in self.base["rows"][task]["nll"]]

    def outcomes(self, label: str, tasks: Sequence[str], key: str) -> Outcomes:
        """Task -> (seeds, rows)."""
        return outcomes_of(self.by_label[label], tasks, key)

    def diverged(self, label: str) -> int:
        """How many of a method's trainings ended in no number."""
        tasks = self.with_nll()
        return sum(any(None in cell["rows"][task]["nll"] for task in tasks) for cell in self.by_label[label])


def outcomes_of(cells: Sequence[Cell], tasks: Sequence[str], key: str = "score") -> Outcomes:
    """Task -> score (or nats) of every row, (seeds, rows), of one method's cells."""
    return {task: np.array([cell["rows"][task][key] for cell in cells], dtype=np.float64) for task in tasks}


def share_rows(cells: Sequence[Cell], tasks: Sequence[str]) -> bool:
    """Whether one method's cells were all scored on the same rows of these tasks, not each on rows of its own."""
    return all(cell["rows"][task]["id"] == cells[0]["rows"][task]["id"] for cell in cells for task in tasks)


def arrange(comparison: Comparison, planned: Sequence[Competitor], cells: Sequence[Cell]) -> PairedCells:
    """Sort cells by method and seed, leave out what cannot be paired, and check that the rest can."""
    every: dict[str, dict[int, Cell]] = {item.label: {} for item in planned}
    for cell in cells:
        if cell["kind"] == "seed" and cell["label"] in every:
            every[cell["label"]][cell["seed"]] = cell
    order = comparison.compare.more_seeds(comparison.compare.looks()[-1])
    # max keeps the first of equals
    most = max(order, key=lambda seed: sum(seed in own for own in every.values()))
    kept = {label: own for label, own in every.items() if most in own}
    seeds = tuple(seed for seed in order if all(seed in own for own in kept.values()))
    base = next(cell for cell in cells if cell["kind"] == "base")
    theirs = [name for name, score in base["scores"]["tasks"].items() if score.get("group") == "harness"]
    return PairedCells(
        base=base,
        by_label={label: [own[seed] for seed in seeds] for label, own in kept.items()},
        seeds=seeds,
        trained=[task.name for task in comparison.recipe.tasks],
        extra=[*(task.name for task in comparison.recipe.evaluate.extra_tasks), *theirs],
        shared_rows=_shared_rows(base, [[own[seed] for own in kept.values()] for seed in seeds]),
    )


def _shared_rows(base: Cell, by_seed: Sequence[Sequence[Cell]]) -> bool:
    """Whether all seeds were scored on the same rows; False where each has rows of its own.

    Raises:
        DataError: Some cells of a seed, or some seeds, have other rows than the rest.
    """

    def rows(cell: Cell) -> dict[str, Any]:
        return {task: found["id"] for task, found in cell["rows"].items()}

    firsts = [own[0] for own in by_seed]
    for own in by_seed:
        for cell in own:
            _same_rows(cell, own[0])
    same = [rows(cell) == rows(firsts[0]) for cell in firsts]
    if all(same):
        _same_rows(firsts[0], base)
        return True
    if not all(_apart(a, b) for k, a in enumerate(firsts) for b in firsts[:k]):
        _same_rows(firsts[same.index(False)], firsts[0])
    return False


def _apart(one: Cell, other: Cell) -> bool:
    """Whether two cells have no row in common, and as many of them."""
    pairs = [(found["id"], other["rows"][task]["id"]) for task, found in one["rows"].items()]
    return all(set(a).isdisjoint(b) and len(a) == len(b) for a, b in pairs)


def _same_rows(cell: Cell, first: Cell) -> None:
    """Refuse cells that were scored on different rows."""
    for task, rows in cell["rows"].items():
        if rows["id"] != first["rows"][task]["id"]:
            raise DataError(
                f"{cell['cell']} and {first['cell']} were scored on different rows of {task}, so they cannot be "
                "compared row by row: the task's data have changed in between. Remove the older one's file from "
                "the folder cells and start the comparison again."
            )
