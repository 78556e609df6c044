"""A comparison's folder, read back: finished, or as far as it has come."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from multiflora.comparison.results import Summary
from multiflora.comparison.spec import COMPARISON, SUMMARY, Comparison, load_comparison
from multiflora.errors import ConfigError
from multiflora.files import user_path

if TYPE_CHECKING:
    from multiflora.comparison.plan import Competitor
    from multiflora.comparison.tuning import Trial, Tuning

__all__ = ["Saved", "read_comparison"]


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a comparison's folder holds."""

    folder: Path
    comparison: Comparison
    summary: Summary
    """Of all cells, or of those that are finished."""
    missing: int
    """Trainings that have yet to finish."""
    left_out: int
    """Trainings that are finished but have no counterparts to be paired with yet."""

    def cells(self) -> list[dict[str, Any]]:
        """The numbers of every training that the summary is made of, method by method, seed by seed.

        Raises:
            ConfigError: A cell's file is gone.
        """
        gone = [name for name in self.summary.cells if not (self.folder / "cells" / f"{name}.json").is_file()]
        if gone:
            raise ConfigError(
                f"{self.folder} has a summary of cells that are not there ({gone[0]} and {len(gone) - 1} more); copy "
                "the comparison's folder as a whole, or start the comparison again."
            )
        found = [json.loads((self.folder / "cells" / f"{name}.json").read_text("utf-8")) for name in self.summary.cells]
        order = [row.label for row in self.summary.rows]
        own = [cell for cell in found if cell["kind"] == "seed"]
        return sorted(own, key=lambda cell: (order.index(cell["label"]), self.summary.seeds.index(cell["seed"])))


def read_comparison(folder: str | Path) -> Saved:
    """Read a comparison's folder; nothing is run.

    Args:
        folder: Its output folder.

    Raises:
        ConfigError: The folder holds no comparison, or none of its trainings has finished.
    """
    folder = user_path(folder)
    if not (folder / COMPARISON).is_file():
        raise ConfigError(f"{folder} holds no comparison ({COMPARISON} is missing); give a comparison's output folder.")
    comparison = load_comparison(folder / COMPARISON)
    if (folder / SUMMARY).is_file():
        summary = _in_order(TypeAdapter(Summary).validate_json((folder / SUMMARY).read_text("utf-8")), comparison)
        return Saved(folder=folder, comparison=comparison, summary=summary, missing=0, left_out=0)
    return _unfinished(folder, comparison)


def _in_order(summary: Summary, comparison: Comparison) -> Summary:
    """Tasks in the order of the recipe; JSON has them sorted by name."""
    order = [task.name for task in comparison.recipe.tasks]
    return replace(summary, metrics={t: summary.metrics[t] for t in (*order, *summary.extra) if t in summary.metrics})


def _unfinished(folder: Path, comparison: Comparison) -> Saved:
    """Sum up the cells that are there and belong to the comparison as it is now."""
    from multiflora.comparison.cell import read_cell
    from multiflora.comparison.clock import clock_cells, in_time
    from multiflora.comparison.looks import read_looks
    from multiflora.comparison.plan import base_cell, plan_of, seed_cell
    from multiflora.comparison.summary import summarise

    planned, spec = plan_of(comparison), comparison.compare
    clocks = [read_cell(cell, folder) for cell in clock_cells(comparison, planned)]
    cells: list[dict[str, Any] | None] = []
    tunings: dict[str, Tuning] = {}
    if None not in clocks:
        planned = in_time(comparison, planned, [cell for cell in clocks if cell is not None])
        tunings = _tunings(folder, comparison, planned)
        wanted = [base_cell(comparison)]
        for item in planned:
            rate = tunings[item.label].chosen if item.label in tunings else None
            if rate is not None or spec.learning_rate is None:
                wanted += [seed_cell(comparison, item, seed, rate) for seed in spec.more_seeds(spec.looks()[-1])]
        cells = [read_cell(cell, folder) for cell in wanted]
    finished = [cell for cell in cells if cell is not None]
    done = sum(cell["kind"] == "seed" for cell in finished)
    if not done or len(finished) == done:
        raise ConfigError(
            f"No training of the comparison in {folder} has finished yet; there is nothing to tell. Go on with it: "
            f"multiflora compare {folder / COMPARISON}."
        )
    names = [cell["cell"] for cell in finished if cell["kind"] == "seed"]
    summary = summarise(comparison, planned, finished, tunings, read_looks(folder, names))
    # where seeds are added, those of the next look
    total = next((len(planned) * n for n in spec.looks() if len(planned) * n >= done), done)
    return Saved(
        folder=folder,
        comparison=comparison,
        summary=summary,
        missing=total - done,
        left_out=done - (len(summary.cells) - 1),
    )


def _tunings(folder: Path, comparison: Comparison, planned: Sequence[Competitor]) -> dict[str, Tuning]:
    """What the finished trials of the comparison as it is now say of each method's learning rate."""
    from multiflora.comparison.plan import trial_cell
    from multiflora.comparison.search import trial_of
    from multiflora.comparison.tuning import decide

    search = comparison.compare.learning_rate
    if search is None:
        return {}
    by_label: dict[str, list[Trial]] = {item.label: [] for item in planned}
    items = {item.label: item for item in planned}
    for path in sorted((folder / "cells").glob("*-trial*.json")):
        cell = json.loads(path.read_text("utf-8"))
        item = items.get(cell["label"])
        # a name has a digest of the recipe, so a trial of an earlier version of the comparison has another name
        if item is not None and trial_cell(comparison, item, cell["seed"], cell["learning_rate"]).name == path.stem:
            by_label[item.label].append(trial_of(cell))
    return {label: decide(trials, search.max_steps) for label, trials in by_label.items() if trials}
