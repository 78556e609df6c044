"""Where an analysis is, and of which methods there is one. Nothing here needs torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multiflora.methods import METHODS

__all__ = ["FOLDER", "MEASURES", "has_update", "of_cell", "read_measures"]

FOLDER = "analysis"
"""Where an analysis is written, within the run or comparison."""

MEASURES = Path(FOLDER) / "analysis.json"
"""All that was measured, within the run or comparison."""


def read_measures(folder: Path) -> dict[str, Any]:
    """What was measured of a run or comparison before; empty where nothing was."""
    path = folder / MEASURES
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found


def of_cell(measures: Mapping[str, Any], cell: Mapping[str, Any]) -> dict[str, Any]:
    """A run's measures as those of a comparison's cell, under the label that it has there."""
    return {**measures, "label": cell["label"], "cell": cell["cell"], "seed": cell["seed"]}


def has_update(method: str) -> bool:
    """Whether a method adds something to weight matrices, so that it can be analysed.

    Example:
        >>> has_update("rlora"), has_update("prompt")
        (True, False)
    """
    from multiflora.methods.baselines import BASELINES

    if method not in METHODS:
        return False
    card = METHODS[method]
    return card.module is not None or card.trains in ("weights", "factors") or BASELINES[method].shapes is not None
