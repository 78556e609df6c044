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

    own = method in METHODS and METHODS[method].module is not None
    return own or method == "full" or (method in BASELINES and BASELINES[method].shapes is not None)
