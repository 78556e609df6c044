r"""Do the heads of a token router take tasks? Normalised mutual information of head and task, beside the score.

    python tools/when_router.py runs/when-router

reads a finished comparison. For a layer, the joint law of task t and head h is the mean gate of the task's tokens, all
tasks weighing the same; of a run, the mean over layers is taken. 0: every task uses the heads alike; 1: each head
belongs to one task.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from multiflora.analysis.files import read_measures
from multiflora.comparison.statistics import Interval, t_interval


def head_task_information(by_task: Sequence[Sequence[float]]) -> float:
    r"""Normalised mutual information, :math:`2 I(t; h) / (H(t) + H(h))`.

    Args:
        by_task: Mean gate of each task's tokens, (tasks, heads).

    Example:
        >>> head_task_information([[1.0, 0.0], [0.0, 1.0]]), head_task_information([[0.5, 0.5], [0.5, 0.5]])
        (1.0, 0.0)
    """
    gates = np.asarray(by_task, dtype=np.float64)
    joint = gates / gates.sum(1, keepdims=True) / len(gates)
    tasks, heads = _entropy(joint.sum(1)), _entropy(joint.sum(0))
    both = tasks + heads
    return float(2 * max(both - _entropy(joint.ravel()), 0.0) / both) if both else 0.0


def _entropy(p: np.typing.NDArray[np.float64]) -> float:
    known = p[p > 0]
    return float(-(known * np.log(known)).sum())


def rows(folder: Path) -> dict[str, tuple[Interval, Interval]]:
    """Label -> information and macro score, over seeds, of the runs that have routing."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for path in sorted((folder / "cells").glob("*-seed*.json")):
        cell = json.loads(path.read_text("utf-8"))
        routing = read_measures(folder / "runs" / cell["cell"]).get("routing") or {}
        layers = [layer["by_task"] for layer in routing.values() if layer["by_task"]]
        if layers:
            information, score = found.setdefault(cell["label"], ([], []))
            information.append(float(np.mean([head_task_information(layer) for layer in layers])))
            score.append(cell["scores"]["macro"])
    return {label: (t_interval(information), t_interval(score)) for label, (information, score) in found.items()}


def _words(value: Interval, factor: float, digits: int) -> str:
    if value.low is None or value.high is None:
        return f"{factor * value.mean:.{digits}f}"
    return f"{factor * value.mean:.{digits}f} ({factor * value.low:.{digits}f} to {factor * value.high:.{digits}f})"


if __name__ == "__main__":
    print("| router | information of head and task | macro score, % |")
    print("|---|---|---|")
    for label, (information, score) in rows(Path(sys.argv[1])).items():
        print(f"| {label} | {_words(information, 1, 3)} | {_words(score, 100, 1)} |")
