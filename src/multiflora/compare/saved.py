"""A comparison's folder, read back: finished, or as far as it has come."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from multiflora.compare.results import Summary
from multiflora.compare.spec import Comparison, load_comparison
from multiflora.errors import ConfigError

__all__ = ["COMPARISON", "SUMMARY", "Saved", "read_comparison"]

COMPARISON, SUMMARY = "comparison.yaml", "summary.json"
"""Files of a comparison: what it is, and, once it is finished, what it found."""


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
    folder = Path(folder).expanduser()
    if not (folder / COMPARISON).is_file():
        raise ConfigError(f"{folder} holds no comparison ({COMPARISON} is missing); give a comparison's output folder.")
    comparison = load_comparison(folder / COMPARISON)
    if (folder / SUMMARY).is_file():
        summary = _in_order(TypeAdapter(Summary).validate_json((folder / SUMMARY).read_text("utf-8")), comparison)
        return Saved(folder=folder, comparison=comparison, summary=summary, missing=0, left_out=0)
    return _unfinished(folder, comparison)


def _in_order(summary: Summary, comparison: Comparison) -> Summary:
    """Tasks in the order of the recipe; JSON has them sorted by name."""
    order = [task.name for task in (*comparison.recipe.tasks, *comparison.recipe.evaluate.extra_tasks)]
    return replace(summary, metrics={task: summary.metrics[task] for task in order if task in summary.metrics})


def _unfinished(folder: Path, comparison: Comparison) -> Saved:
    """Sum up the cells that are there and belong to the comparison as it is now."""
    from multiflora.compare.looks import read_looks
    from multiflora.compare.plan import base_cell, seed_cell, trial_cell
    from multiflora.compare.run import plan_of
    from multiflora.compare.search import loss_of
    from multiflora.compare.summary import summarise
    from multiflora.compare.tuning import Trial, decide

    planned = plan_of(comparison)
    by_label = {item.label: item for item in planned}
    spec = comparison.compare
    searched = spec.learning_rate is not None
    cells, trials = [], {}
    for path in (folder / "cells").glob("*.json"):
        cell = json.loads(path.read_text("utf-8"))
        item, rate = by_label.get(cell["label"]), cell["learning_rate"]
        # a cell's name has a digest of its recipe, so one of an earlier version of the comparison has another name
        if cell["kind"] == "base":
            current = base_cell(comparison).name == cell["cell"]
        elif item is None:
            current = False
        elif cell["kind"] == "seed":
            known = cell["seed"] in spec.more_seeds(spec.looks()[-1])
            current = known and seed_cell(comparison, item, cell["seed"], rate if searched else None).name == path.stem
        else:
            current = searched and trial_cell(comparison, item, cell["number"], rate).name == path.stem
        if current and cell["kind"] == "trial":
            trials[cell["label"], cell["number"]] = (rate, loss_of(cell))
        elif current:
            cells.append(cell)
    done = sum(cell["kind"] == "seed" for cell in cells)
    if not done or len(cells) == done:
        raise ConfigError(
            f"No training of the comparison in {folder} has finished yet; there is nothing to tell. Go on with it: "
            f"multiflora compare {folder / COMPARISON}."
        )
    tried = {
        label: [Trial(r, 0, None, loss) for key, (r, loss) in trials.items() if key[0] == label] for label in by_label
    }
    tunings = {label: decide(own) for label, own in tried.items() if own}
    names = [cell["cell"] for cell in cells if cell["kind"] == "seed"]
    summary = summarise(comparison, planned, cells, tunings, read_looks(folder, names))
    # where seeds are added, those of the next look
    total = next((len(planned) * n for n in spec.looks() if len(planned) * n >= done), done)
    return Saved(
        folder=folder,
        comparison=comparison,
        summary=summary,
        missing=total - done,
        left_out=done - (len(summary.cells) - 1),
    )
