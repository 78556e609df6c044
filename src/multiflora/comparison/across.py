"""The figures and findings of several runs beside each other: which method's update is flatter, whose heads differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np

from multiflora.analysis.drawings import few_drawings, mean_energy
from multiflora.analysis.plots import Drawing, bars, lines
from multiflora.comparison.statistics import Interval, t_interval

__all__ = ["findings", "means", "own_drawings", "shared_drawings"]

Runs = Sequence[Mapping[str, Any]]

# what the papers report of each pair: (measure, method, than method, direction, what it means, paper)
_CLAIMS = (
    ("effective_rank", "multilora", "lora", 1, "spreads its update over more directions than", "arXiv 2311.11501"),
    ("top_share", "multilora", "lora", -1, "leaves less of its update to the first direction than", "arXiv 2311.11501"),
    ("cosine", "rlora", "hydralora", -1, "has heads that differ more than those of", "arXiv 2502.15455"),
)
_WORDS = {"effective_rank": "effective rank", "top_share": "share of the first direction", "cosine": "cosine of heads"}


def means(runs: Runs, key: str) -> dict[str, list[float]]:
    """Label -> for each seed the mean over layers of a spectrum's measure, or of the heads' ``cosine``."""
    found: dict[str, list[float]] = {}
    for run in runs:
        layers = run["heads"].get("layers", {}) if key == "cosine" else run["spectra"]
        values = [layer[key] for layer in layers.values() if layer[key] is not None]
        if values:
            found.setdefault(run["label"], []).append(fmean(values))
    return found


def findings(runs: Runs) -> list[str]:
    """Say whether the papers' figures come out here in the direction that the papers report, one sentence each."""
    method = {run["label"]: run["method"] for run in runs}
    said = []
    for key, ours, other, direction, claim, paper in _CLAIMS:
        by_label = means(runs, key)
        mine = next((label for label in by_label if method[label] == ours), None)
        theirs = next((label for label in by_label if method[label] == other), None)
        if mine is None or theirs is None:
            continue
        a, b = t_interval(by_label[mine]), t_interval(by_label[theirs])
        right = (a.mean - b.mean) * direction > 0
        told = f"{_WORDS[key]} {_number(a)} for {mine}, {_number(b)} for {theirs}"
        if not right:
            said.append(f"{mine} does not come out as {paper} reports ('{claim} {other}'): {told}.")
        elif _apart(a, b):
            said.append(f"{mine} {claim} {theirs}, as {paper} reports: {told}.")
        else:
            said.append(f"{mine} {claim} {theirs} on average, as {paper} reports, but the intervals overlap: {told}.")
    return said


def _apart(a: Interval, b: Interval) -> bool:
    """Whether two intervals over seeds have nothing in common."""
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return False
    return a.low > b.high or b.low > a.high


def _number(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.mean:.3g} (one seed)"
    return f"{interval.mean:.3g} ({interval.low:.3g} to {interval.high:.3g})"


def shared_drawings(runs: Runs) -> list[Drawing]:
    """Draw all methods beside each other."""
    drawn = [_energy(runs)]
    for key, name, title, reading in (
        (
            "effective_rank",
            "effective-ranks",
            "Directions that the update uses",
            "Effective rank, mean over layers, with its 95 % interval over seeds; its limit is the rank of the update.",
        ),
        (
            "top_share",
            "top-shares",
            "Share of the first direction",
            "How much of the update's energy is in one direction, mean over layers; 1 is all of it.",
        ),
        (
            "cosine",
            "head-cosines",
            "Similarity of heads",
            "Mean cosine between the heads of a layer, mean over layers: near 1 they have learned the same.",
        ),
    ):
        by_label = means(runs, key)
        if by_label:
            drawn.append(_dots(by_label, name, title, reading))
    return drawn


def own_drawings(runs: Runs) -> dict[str, list[Drawing]]:
    """Draw what only one run can have, of each method's first: its layers, its routing, its heads, the tasks' conflict.

    Returns:
        Label -> its figures.
    """
    first: dict[str, Mapping[str, Any]] = {}
    for run in runs:
        first.setdefault(run["label"], run)
    return {label: [_of(label, drawing) for drawing in few_drawings(run)] for label, run in first.items()}


def _of(label: str, drawing: Drawing) -> Drawing:
    """The same figure with the run's label in its name and title, its ids kept apart from those of other runs."""
    name = f"{label}-{drawing.name}"
    svg = drawing.svg.replace(f'id="{drawing.name}-', f'id="{name}-').replace(f"#{drawing.name}-", f"#{name}-")
    return replace(drawing, name=name, title=f"{label}: {drawing.title}", alt=f"{label}. {drawing.alt}", svg=svg)


def _energy(runs: Runs) -> Drawing:
    by_label: dict[str, list[list[float]]] = {}
    for run in runs:
        by_label.setdefault(run["label"], []).append(mean_energy(list(run["spectra"].values())))
    series = {
        label: np.mean([v[: min(map(len, own))] for v in own], axis=0).tolist() for label, own in by_label.items()
    }
    return lines(
        "energies",
        "Cumulative energy of the update",
        "How much of the update is in its first i directions, mean over layers and seeds: a line that rises late uses "
        "many directions; one that ends early has a smaller rank.",
        series,
        x="directions",
        y="share of the energy",
        alt="Share of the first direction: " + ", ".join(f"{k} {v[0]:.2f}" for k, v in series.items() if v) + ".",
    )


def _dots(by_label: Mapping[str, Sequence[float]], name: str, title: str, reading: str) -> Drawing:
    intervals = {label: t_interval(values) for label, values in by_label.items()}
    return bars(
        name,
        title,
        reading,
        {label: interval.mean for label, interval in intervals.items()},
        ends={k: (i.low, i.high) for k, i in intervals.items() if i.low is not None and i.high is not None},
        x=title.lower(),
        zero=False,
        alt=f"{title}: " + ", ".join(f"{label} {_number(interval)}" for label, interval in intervals.items()) + ".",
    )
