"""The benchmark's figures, from its samples; equal results give equal files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from multiflora.bench.results import Clock, LayerCase, Results, StepCase
from multiflora.bench.stats import median, total
from multiflora.errors import EnvironmentProblem

__all__ = ["figures"]

# distinguishable in common colour blindness (Okabe and Ito 2008)
_COLOURS = {
    "products": "#7F7F7F",
    "frozen": "#7F7F7F",
    "packed": "#0072B2",
    "multilora": "#56B4E9",
    "peft": "#E69F00",
    "peft 3r": "#F0C36D",
    "loop": "#D55E00",
    "compiled loop": "#CC79A7",
}
LABELS = {
    "products": "floor: products alone",
    "multilora products": "floor: MultiLoRA's products alone",
    "frozen": "frozen model",
    "packed": "R-LoRA, packed",
    "rlora": "R-LoRA, prepared",
    "multilora": "MultiLoRA, packed",
    "peft": "peft LoRA",
    "peft 3r": "peft LoRA of rank 3r",
    "loop": "published loop",
    "compiled loop": "torch.compile of the loop",
}


def figures(results: Results) -> dict[str, str]:
    """Name -> SVG of every figure the results have samples for.

    Raises:
        EnvironmentProblem: matplotlib is absent.
    """
    # of one layer the largest batch, so that the figure fits a screen; the page's tables have all
    largest: dict[Any, LayerCase] = {}
    for case in sorted((case for case in results.layers if case.dropout > 0), key=lambda case: case.tokens):
        largest[case.model, case.layer, case.dtype] = case
    layers = [case for case in results.layers if case in largest.values()]
    drawn = {}
    if layers:
        drawn["layers"] = _layers(layers, results.clock)
    if results.steps:
        drawn["steps"] = _steps(results.steps, results.clock)
    return drawn


def _layers(cases: Sequence[LayerCase], clock: Clock) -> str:
    """Extra time over the frozen layer, as a share of it."""
    names = ("products", "packed", "peft", "loop", "compiled loop")
    with _style():
        figure, axes = _canvas(0.9 + 0.62 * len(cases))
        for row, case in enumerate(cases):
            frozen = median(total(case.seconds, "frozen", clock))
            present = [name for name in names if name in case.seconds]
            for k, name in enumerate(present):
                seconds = total(case.seconds, name, clock)
                added = median(seconds) if name == "products" else median(_less(seconds, case, clock))
                place = row + (k - (len(present) - 1) / 2) * 0.17
                axes.barh(place, 100 * added / frozen, 0.16, color=_COLOURS[name], label=LABELS[name])
        labels = [f"{c.model} {c.layer}\n{c.d_in}→{c.d_out}, {c.tokens} tokens, {c.dtype}" for c in cases]
        axes.set_yticks(range(len(cases)), labels, fontsize=7)
        axes.set_xlabel("added to the frozen layer's forward and backward, per cent of its time (dropout 0.1)")
        return _svg(figure, axes, "layers")


def _less(seconds: Sequence[float], case: LayerCase, clock: Clock) -> list[float]:
    return [a - b for a, b in zip(seconds, total(case.seconds, "frozen", clock), strict=True)]


def _steps(cases: Sequence[StepCase], clock: Clock) -> str:
    """A whole step of every competitor."""
    names = ("frozen", "packed", "peft", "multilora", "peft 3r")
    with _style():
        figure, axes = _canvas(0.9 + 1.1 * len(cases))
        for row, case in enumerate(cases):
            for k, name in enumerate(name for name in names if name in case.seconds):
                seconds = median(total(case.seconds, name, clock))
                axes.barh(row + (k - 2) * 0.17, seconds, 0.16, color=_COLOURS[name], label=LABELS[name])
        labels = [f"{c.model}, {c.dtype}\n{c.rows} × {c.length} tokens, dropout {c.dropout:g}" for c in cases]
        axes.set_yticks(range(len(cases)), labels, fontsize=8)
        axes.set_xlabel("seconds for a training step")
        return _svg(figure, axes, "steps")


def _style() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise EnvironmentProblem(
            "Figures need matplotlib, which is not installed: pip install 'multiflora[plot]'."
        ) from error
    # text stays text, and ids come from a salt of our own: the same figure is the same file
    return mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bench", "font.size": 9})


def _canvas(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no pyplot: nothing global, nothing to close

    figure = Figure(figsize=(8.0, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Any, axes: Any, name: str) -> str:
    axes.invert_yaxis()
    axes.margins(y=0.02)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#888888", alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    shown = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    # under the axes: inside, a short figure would have it on its bars
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    written = io.StringIO()
    figure.savefig(written, format="svg", facecolor="white", metadata={"Date": None, "Creator": None, "Title": name})
    # matplotlib ends some lines with a space
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines()) + "\n"
