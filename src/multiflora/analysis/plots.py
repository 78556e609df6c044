"""Arrays to figures. Each figure brings the sentence that says how to read it, and the text that stands for it.

Drawn once for light and dark: ink is a marked colour that becomes the page's own in the SVG and stays black in the PNG.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multiflora.errors import EnvironmentProblem
from multiflora.files import saving, write_bytes, write_text

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "COLOURS",
    "Drawing",
    "bars",
    "curves",
    "heat_map",
    "heat_maps",
    "lines",
    "over_rates",
    "points",
    "save_drawing",
]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f")
"""Of lines and points: distinguishable in common colour blindness (Okabe and Ito 2008, black left out)."""

_STYLES = ("-", "--", "-.", ":")
_INK = "#010203"  # a black no figure uses otherwise
_LONGEST = 32  # letters of a name; a longer one would leave no room for the figure
_WIDTH = 4.8  # inches: at the width of a phone, 10 points are still 10 pixels


@dataclass(frozen=True)
class Drawing:
    """One figure, ready for a page or a file."""

    name: str
    """Of its files, and its place on a page."""
    title: str
    reading: str
    """One sentence on how to read it."""
    alt: str
    """What it shows, for those who do not see it."""
    svg: str
    """Scalable, inline in HTML; text in the page's own colour."""
    figure: Any = field(repr=False, compare=False)
    """matplotlib's, laid out."""

    @cached_property
    def png(self) -> bytes:
        """The same as pixels, drawn when it is first asked for."""
        raster = io.BytesIO()
        self.figure.savefig(raster, format="png", dpi=150, facecolor="white", metadata={"Software": None})
        return raster.getvalue()


@contextmanager
def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> Iterator[tuple[Any, Any]]:
    """A figure with one pair of axes, or a grid of them."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise EnvironmentProblem(
            "Figures need matplotlib, which is not installed: pip install 'multiflora[plot]'."
        ) from error
    from matplotlib.figure import Figure  # no pyplot: nothing global, nothing to close

    style = {
        "svg.fonttype": "none",
        "font.size": 10,
        "font.family": "sans-serif",
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(rows, columns)


def _drawing(figure: Any, name: str, title: str, reading: str, alt: str) -> Drawing:
    import matplotlib as mpl

    vector = io.StringIO()
    # laid out once for both files: it is most of the work
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")
    # a salt of its own keeps ids of figures on one page apart, and the same figure the same
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(vector, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Drawing(name, title, reading, alt, _inline(vector.getvalue(), name, alt), figure)


def _inline(svg: str, name: str, alt: str) -> str:
    """Make matplotlib's SVG fit into a page: ids of its own, the page's ink, a text for screen readers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(?<=\bid=")', f"{name}-", svg)
    svg = re.sub(r'(?<=url\(#)|(?<=xlink:href="#)', f"{name}-", svg)
    svg = svg.replace(_INK, "currentColor").replace("<metadata>", "<metadata>", 1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)  # a hundredth of a point is less than any screen shows
    svg = re.sub(r">\s+<(?!/?text)", "><", svg)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg, count=1)
    safe = alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{safe}"', 1)


def save_drawing(drawing: Drawing, folder: Path, *, raster: bool = True) -> None:
    """Write ``NAME.svg``, and ``NAME.png`` with ``raster``."""
    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # on its own a file has no page to take its ink from
        write_text(folder / f"{drawing.name}.svg", drawing.svg.replace("<svg", '<svg color="#111"', 1) + "\n")
        if raster:
            write_bytes(folder / f"{drawing.name}.png", drawing.png)


def curves(
    name: str,
    title: str,
    reading: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    alt: str,
    log: bool = False,
) -> Drawing:
    """Lines through points: label -> (x values, y values)."""
    with _figure(_WIDTH, 3.1) as (figure, axes):
        for k, (label, (xs, ys)) in enumerate(series.items()):
            axes.plot(xs, ys, color=COLOURS[k % 8], linestyle=_STYLES[k // 8 % 4], label=_plain(label), linewidth=1.6)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if log:
            axes.set_yscale("log")
        axes.xaxis.get_major_locator().set_params(integer=True)  # steps, layers and directions are counted
        axes.grid(color="#888888", alpha=0.25, linewidth=0.6)
        _legend(figure, list(series))
        return _drawing(figure, name, title, reading, alt)


def lines(
    name: str,
    title: str,
    reading: str,
    series: Mapping[str, Sequence[float]],
    *,
    x: str,
    y: str,
    alt: str,
    first: int = 1,
    log: bool = False,
) -> Drawing:
    """Lines over whole numbers: label -> values at ``first``, ``first`` + 1, ..."""
    placed = {label: (list(range(first, first + len(values))), values) for label, values in series.items()}
    return curves(name, title, reading, placed, x=x, y=y, alt=alt, log=log)


def bars(
    name: str,
    title: str,
    reading: str,
    values: Mapping[str, float],
    *,
    x: str,
    alt: str,
    ends: Mapping[str, tuple[float, float]] | None = None,
    before: Mapping[str, float] | None = None,
    zero: bool = True,
    whole: bool = False,
) -> Drawing:
    """One dot for each label with its interval, one below the other; a line at 0 where that means something.

    ``before`` puts a hollow dot where the label was before; ``whole`` marks whole numbers only.
    """
    with _figure(_WIDTH, 0.8 + 0.3 * len(values)) as (figure, axes):
        for k, (label, value) in enumerate(values.items()):
            if ends and label in ends:
                axes.plot(ends[label], (k, k), color=COLOURS[0], linewidth=2)
            if before and label in before:
                axes.plot((before[label], value), (k, k), color=COLOURS[0], linewidth=0.8, linestyle=":")
                axes.plot([before[label]], [k], "o", color=COLOURS[1], markerfacecolor="none", markersize=6)
            axes.plot([value], [k], "o", color=COLOURS[0], markersize=6)
        axes.set_yticks(range(len(values)), [_plain(label) for label in values])
        axes.invert_yaxis()
        axes.margins(y=0.12)
        if whole:
            axes.xaxis.get_major_locator().set_params(integer=True)
        if zero:
            axes.axvline(0, color=_INK, linewidth=0.8)
        axes.grid(axis="x", color="#888888", alpha=0.3, linewidth=0.6)
        axes.set_xlabel(x)
        return _drawing(figure, name, title, reading, alt)


def heat_map(
    name: str,
    title: str,
    reading: str,
    values: Sequence[Sequence[float | None]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    alt: str,
    y: str = "",
    x: str = "",
    low: float | None = None,
    high: float | None = None,
    diverging: bool = False,
    written: bool | None = None,
    digits: int = 2,
) -> Drawing:
    """A table of shades; numbers stand in it where there are few."""
    import numpy as np

    shades = np.array([[np.nan if v is None else v for v in row] for row in values], dtype=float)
    small = len(rows) * len(columns) <= 80 if written is None else written
    with _figure(_WIDTH, min(1.3 + 0.34 * len(rows), 5.0)) as (figure, axes):
        image = axes.imshow(shades, aspect="auto", cmap="RdBu" if diverging else "viridis", vmin=low, vmax=high)
        axes.spines[:].set_visible(False)
        _ticks(axes, rows, columns)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        figure.colorbar(image, ax=axes, shrink=0.9)
        if small:
            for i, row in enumerate(shades):
                for j, value in enumerate(row):
                    if not np.isnan(value):
                        ink = "black" if image.norm(value) > 0.5 and not diverging else "white"
                        if diverging:
                            ink = "white" if abs(float(image.norm(value)) - 0.5) > 0.3 else "black"
                        told = f"{round(float(value), digits) + 0.0:.{digits}f}"  # no -0.00
                        axes.text(j, i, told, ha="center", va="center", color=ink, fontsize=8)
        return _drawing(figure, name, title, reading, alt)


def heat_maps(
    name: str,
    title: str,
    reading: str,
    panels: Mapping[str, Sequence[Sequence[float]]],
    *,
    x: str,
    y: str,
    alt: str,
    low: float,
    high: float,
) -> Drawing:
    """Tables of shades beside each other, on one scale: title -> rows of numbers, the first row on top.

    All are parts of one image, with an empty column between them: axes of their own would take ten times as long.
    """
    import numpy as np

    height = max(map(len, panels.values()))
    edges = np.cumsum([0, *(len(values[0]) + 1 for values in panels.values())])
    shades = np.full((height, edges[-1] - 1), np.nan)
    for left, values in zip(edges, panels.values(), strict=False):
        shades[: len(values), left : left + len(values[0])] = values
    with _figure(_WIDTH, 3.4) as (figure, axes):
        image = axes.imshow(shades, aspect="auto", cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
        axes.spines[:].set_visible(False)
        middles = [(left + right) / 2 - 1 for left, right in itertools.pairwise(edges)]
        axes.set_xticks(middles, [_plain(label) for label in panels], rotation=35, ha="right", rotation_mode="anchor")
        axes.tick_params(axis="x", length=0)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        figure.colorbar(image, ax=axes, shrink=0.8)
        return _drawing(figure, name, title, reading, alt)


def over_rates(
    name: str,
    title: str,
    reading: str,
    dots: Mapping[str, Sequence[tuple[float, float]]],
    *,
    chosen: Mapping[str, float],
    y: str,
    alt: str,
) -> Drawing:
    """Dots over learning rates, a line for each label through its means, and a ring round the chosen rate's mean."""
    with _figure(_WIDTH, 3.1) as (figure, axes):
        for k, (label, own) in enumerate(dots.items()):
            rates = sorted({rate for rate, _ in own})
            means = [sum(v for r, v in own if r == rate) / sum(r == rate for r, _ in own) for rate in rates]
            style = {"color": COLOURS[k % 8], "linewidth": 1.6}
            axes.plot(rates, means, linestyle=_STYLES[k // 8 % 4], label=_plain(label), **style)
            axes.plot([r for r, _ in own], [v for _, v in own], "o", color=COLOURS[k % 8], markersize=3.5)
            if chosen[label] in rates:
                best = means[rates.index(chosen[label])]
                axes.plot([chosen[label]], [best], "o", color=COLOURS[k % 8], markerfacecolor="none", markersize=10)
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel(y)
        axes.grid(color="#888888", alpha=0.25, linewidth=0.6)
        _legend(figure, list(dots))
        return _drawing(figure, name, title, reading, alt)


def points(
    name: str,
    title: str,
    reading: str,
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    *,
    alt: str,
) -> Drawing:
    """Points in planes beside each other, title -> group -> points, coloured by group; the axes mean nothing."""
    across = min(len(panels), 4)
    down = -(-len(panels) // across)
    groups = list(dict.fromkeys(label for own in panels.values() for label in own))
    with _figure(_WIDTH, 0.5 + 1.3 * down, down, across) as (figure, axes):
        every = list(axes.flat) if hasattr(axes, "flat") else [axes]
        for place in every:
            place.spines[:].set(visible=True, color="#888888", linewidth=0.4)
            place.set_xticks([])
            place.set_yticks([])
        for place in every[len(panels) :]:
            place.set_axis_off()
        for place, (label, own) in zip(every, panels.items(), strict=False):
            place.set_title(_plain(label), fontsize=9)
            for group, dots in own.items():
                k = groups.index(group)
                xs, ys = zip(*dots, strict=True)
                place.scatter(xs, ys, s=9, color=COLOURS[k % 8], marker="osD^v<>"[k // 8 % 7], label=_plain(group))
        _legend(figure, groups, every[0])
        return _drawing(figure, name, title, reading, alt)


def _plain(name: str) -> str:
    """A name as it is: to matplotlib a dollar would begin a formula, and an underscore in front hides from a legend."""
    short = name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
    return ("\N{ZERO WIDTH SPACE}" if short.startswith("_") else "") + short.replace("$", r"\$")


def _legend(figure: Any, labels: Sequence[str], of: Any = None) -> None:
    """Name what has been drawn, in all axes or those of one, below them, in as many columns as fit."""
    if len(labels) > 1:
        columns = max(1, min(len(labels), 5, 52 // (max(map(len, labels)) + 6)))
        handles = {} if of is None else {"handles": of.get_legend_handles_labels()[0]}
        place = {"loc": "outside lower center", "ncols": columns, "columnspacing": 1.2}
        figure.legend(**handles, **place, frameon=False, fontsize=9)


def _ticks(axes: Any, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Names where there is room, else every n-th."""
    every = max(1, len(columns) // 16)
    axes.set_xticks(range(0, len(columns), every), [_plain(name) for name in columns][::every])
    if max((len(c) for c in columns), default=0) > 4:
        axes.tick_params(axis="x", rotation=35)
        for label in axes.get_xticklabels():
            label.set_ha("right")
    every = max(1, len(rows) // 20)
    axes.set_yticks(range(0, len(rows), every), [_plain(name) for name in rows][::every])
