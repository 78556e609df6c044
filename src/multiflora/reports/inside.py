"""What is inside the adapters, for a page: read where it was measured before, measured where it was not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from multiflora.analysis.drawings import run_drawings
from multiflora.analysis.files import has_update, of_cell, read_measures
from multiflora.analysis.plots import Drawing
from multiflora.comparison.across import findings, own_drawings, shared_drawings
from multiflora.comparison.saved import Saved
from multiflora.reports.page import Fold, Section

__all__ = ["Inside", "inside_comparison", "inside_run"]


@dataclass(frozen=True, kw_only=True)
class Inside:
    """Figures and sentences."""

    findings: Sequence[str] = ()
    drawings: Sequence[Drawing] = ()
    own: Mapping[str, Sequence[Drawing]] = field(default_factory=dict)
    """Method -> the figures that only one of its runs can have."""
    notes: Sequence[str] = ()

    def section(self) -> Section:
        """All of it as a part of a page."""
        return Section(
            name="inside",
            title="Inside the adapters",
            text=[*self.findings, *self.notes],
            figures=self.drawings,
            folds=[
                Fold(title=f"{label}: layers, heads, routing and task conflict of its first seed", figures=own)
                for label, own in self.own.items()
                if own
            ],
        )


def inside_comparison(saved: Saved, *, measure: bool) -> Inside:
    """Look inside the adapters of a comparison.

    Args:
        saved: The comparison.
        measure: Measure what has not been measured yet; takes a while.
    """
    wanted = {cell["cell"]: cell for cell in saved.cells() if has_update(cell["method"])}
    # a cell is measured when it is trained; the comparison's own file has what was measured later
    later = {run.get("cell"): run for run in read_measures(saved.folder).get("runs", ())}
    for name, cell in wanted.items():
        if name not in later and (own := read_measures(saved.folder / "runs" / name)):
            later[name] = of_cell(own, cell)
    # the model card is what a run writes last
    there = all((saved.folder / "runs" / name / "README.md").is_file() for name in wanted)
    if measure and there and wanted.keys() - later.keys():
        later = {run["cell"]: run for run in _measured(saved.folder)["runs"]}
    runs = [later[name] for name in wanted if name in later]
    if not runs:
        return Inside(notes=[_unknown(saved.folder)] if wanted else [])
    missing = len(wanted) - len(runs)
    notes = list(dict.fromkeys(note for run in runs for note in run["notes"]))
    if missing:
        notes.append(f"{missing} of {len(wanted)} adapters have not been looked into: multiflora analyze adds them.")
    return Inside(findings=findings(runs), drawings=shared_drawings(runs), own=own_drawings(runs), notes=notes)


def inside_run(folder: Path, method: str, *, measure: bool) -> Inside:
    """Look inside one run's adapter; see `inside_comparison`."""
    if not has_update(method):
        return Inside()
    measures = read_measures(folder)
    if not measures and measure:
        measures = _measured(folder)
    if not measures:
        return Inside(notes=[_unknown(folder)])
    return Inside(drawings=run_drawings(measures), notes=measures["notes"])


def _measured(folder: Path) -> dict[str, Any]:
    from multiflora.comparison.analyze import analyze  # torch: only where models must be loaded

    return analyze(folder, draw=False).measures


def _unknown(folder: Path) -> str:
    return (
        f"Spectra, heads, routing and task conflict have not been measured: multiflora analyze {folder.resolve().name} "
        "does that, then write the report again."
    )
