"""``report``: a run's or a comparison's folder becomes a page, and its figures and tables files beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from multiflora.analysis.plots import save_drawing
from multiflora.comparison.saved import read_comparison
from multiflora.comparison.spec import COMPARISON
from multiflora.errors import ConfigError
from multiflora.files import check_inside, saving, user_path, write_text
from multiflora.recipe import load_recipe
from multiflora.reports.comparison import comparison_page
from multiflora.reports.inside import inside_comparison, inside_run
from multiflora.reports.page import Page, fit, render
from multiflora.reports.single import run_page

__all__ = ["Report", "report"]

PAGE = "report.html"
"""Name of the page within the folder it speaks of."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was written."""

    page: Path
    """The page: one file that needs no other."""
    folder: Path
    """Its figures (SVG; those that are not folded away as PNG too) and tables (CSV) as files."""
    answer: str


def report(target: str | Path, output: str | Path | None = None, *, measure: bool = True) -> Report:
    """Write the page of a run or a comparison, finished or as far as it has come.

    Args:
        target: Its output folder.
        output: The page; None: ``report.html`` in that folder. Figures and tables go into a folder of the same name
            beside it.
        measure: Look inside adapters where ``multiflora analyze`` has not done so yet, which takes a while; else the
            page has those figures only that are there.

    Raises:
        ConfigError: The folder holds neither, or a comparison of which no training has finished.
        EnvironmentProblem: The page cannot be written, or matplotlib is not installed.

    Example:
        >>> multiflora.report("runs/comparison").page  # doctest: +SKIP
        PosixPath('runs/comparison/report.html')
    """
    source = user_path(target)
    place = source / PAGE if output is None else user_path(output)
    if place.is_dir():
        raise ConfigError(f"{place} is a folder; give the name of the page, e.g. --output {place / PAGE}.")
    page = _page_of(source, measure=measure)
    beside = place.with_suffix("")
    if beside == place:
        beside = place.with_name(f"{place.name}-files")
    if output is None:
        check_inside(source, place)
        check_inside(source, beside)
    # all of it is drawn before anything is written
    with saving(beside):
        beside.mkdir(parents=True, exist_ok=True)
    for drawing in page.figures():
        save_drawing(drawing, beside, raster=not page.folded(drawing))
    for table in page.tables():
        write_text(beside / f"{table.name}.csv", table.to_csv())
    write_text(place, render(fit(replace(page, files=beside.name))))
    return Report(page=place, folder=beside, answer=page.answer)


def _page_of(folder: Path, *, measure: bool) -> Page:
    """Whatever the folder holds, as a page."""
    if (folder / COMPARISON).is_file():
        saved = read_comparison(folder)
        versions: dict[str, str] = saved.cells()[0].get("versions", {})
        return comparison_page(saved, inside_comparison(saved, measure=measure), versions)
    if not (folder / "results.json").is_file():
        raise ConfigError(
            f"{folder} holds neither a run (results.json) nor a comparison ({COMPARISON}); give the output folder of "
            "multiflora train or multiflora compare."
        )
    recipe = load_recipe(folder / "recipe.yaml")
    results, run = _json(folder / "results.json"), _json(folder / "run.json")
    return run_page(folder, recipe, results, run, inside_run(folder, recipe.method.name, measure=measure))


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found
