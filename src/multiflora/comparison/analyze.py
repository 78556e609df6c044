"""Analyse a saved run, or every run of a comparison: measures as JSON, figures as SVG and PNG."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multiflora.analysis.drawings import run_drawings
from multiflora.analysis.files import FOLDER, has_update, of_cell, read_measures
from multiflora.analysis.plots import Drawing, save_drawing
from multiflora.analysis.run import EXAMPLES, keep_measures, measure_run
from multiflora.comparison.across import findings, own_drawings, shared_drawings
from multiflora.comparison.saved import read_comparison
from multiflora.comparison.spec import COMPARISON
from multiflora.errors import ConfigError
from multiflora.files import check_inside, check_writable, saving, user_path, write_json

__all__ = ["Analysis", "analyze"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What was found, and where it was written."""

    folder: Path
    measures: dict[str, Any]
    """What ``analysis.json`` holds."""
    drawings: tuple[Drawing, ...]
    findings: tuple[str, ...]
    """What can be said of it, a sentence each."""


def analyze(
    target: str | Path,
    *,
    against: str | Path | None = None,
    examples: int = EXAMPLES,
    folder: str | Path | None = None,
    draw: bool = True,
) -> Analysis:
    """Look inside a trained adapter, or all adapters of a comparison.

    Args:
        target: A run's output folder, or a comparison's.
        against: Another run, adapter or full fine-tuning, whose update directions are compared with this one's.
        examples: Training examples of each task that are run through the model for routing and task conflict.
        folder: Where to write; None: ``analysis`` within the target.
        draw: Draw the figures too.

    Raises:
        ConfigError: The folder holds no run and no comparison.
        AdapterError: The adapter adds nothing to weight matrices.

    Example:
        >>> multiflora.analyze("runs/rlora").findings  # doctest: +SKIP
    """
    source = user_path(target)
    place = user_path(folder) if folder is not None else source / FOLDER
    if folder is not None:
        check_writable(place)  # what follows takes minutes
    if (source / COMPARISON).is_file():
        if against is not None:
            raise ConfigError(
                f"{source} is a comparison, whose runs are compared with one another; leave out --against."
            )
        measures: dict[str, Any] = _measure_comparison(source, examples)
        found, drawings = findings(measures["runs"]), []
        if draw:
            own = own_drawings(measures["runs"])
            drawings = [*shared_drawings(measures["runs"]), *(d for drawn in own.values() for d in drawn)]
    else:
        measures = measure_run(source, examples=examples, against=None if against is None else user_path(against))
        found, drawings = [], run_drawings(measures) if draw else []
    if folder is None:
        check_inside(source, place)
    with saving(place):
        place.mkdir(parents=True, exist_ok=True)
    write_json(place / "analysis.json", measures)
    for drawing in drawings:
        save_drawing(drawing, place)
    return Analysis(folder=place, measures=measures, drawings=tuple(drawings), findings=tuple(found))


def _measure_comparison(folder: Path, examples: int) -> dict[str, Any]:
    """Measure every finished run of a comparison; one that was measured with as many examples is read."""
    runs = []
    for cell in read_comparison(folder).cells():
        if not has_update(cell["method"]):
            continue
        run = folder / "runs" / cell["cell"]
        measures = read_measures(run)
        if measures.get("examples") != examples:
            log.info("Measuring %s", cell["cell"])
            measures = keep_measures(run, measure_run(run, examples=examples))
        runs.append(of_cell(measures, cell))
    if not runs:
        raise ConfigError(f"{folder} has no finished run with an update to analyse; finish the comparison first.")
    return {"runs": runs}
