"""Where an analysis is, and of which methods there is one. Nothing here needs torch."""

from __future__ import annotations

from pathlib import Path

from multiflora.methods import METHODS

__all__ = ["FOLDER", "MEASURES", "has_update"]

FOLDER = "analysis"
"""Where an analysis is written, within the run or comparison."""

MEASURES = Path(FOLDER) / "analysis.json"
"""All that was measured, within the run or comparison."""


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
