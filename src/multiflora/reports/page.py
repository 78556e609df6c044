"""A page as values, and as HTML: one file, no network, nothing that is not written by us runs in it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from multiflora.analysis.plots import COLOURS, Drawing
from multiflora.reports.tables import Table

__all__ = ["Code", "Fold", "Page", "Section", "fit", "render"]

LIMIT = 4_500_000
"""Bytes of a page, the words around its figures included."""


@dataclass(frozen=True)
class Code:
    """Something to read or to copy: a recipe, a command."""

    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Figures that are shown when they are asked for."""

    title: str
    text: Sequence[str] = ()
    figures: Sequence[Drawing] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a page."""

    name: str
    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Drawing] = ()
    folds: Sequence[Fold] = ()
    code: Sequence[Code] = ()


@dataclass(frozen=True, kw_only=True)
class Page:
    """The whole page: the answer first."""

    title: str
    kind: str
    """What it is a report of, in a word or two."""
    about: str
    warnings: Sequence[str]
    """What must be known before the answer is believed."""
    answer: str
    sentences: Sequence[tuple[str, str]]
    """What can be said of each method (or task): its name and a sentence."""
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    files: str = ""
    """Name of the folder beside the page that has the figures and tables as files."""
    dropped: Sequence[Drawing] = field(default=())
    """Figures that are only there, as the page would grow too large with them."""

    def tables(self) -> list[Table]:
        """All tables, in order."""
        return [t for s in self.sections for t in (*s.tables, *(t for f in s.folds for t in f.tables))]

    def figures(self) -> list[Drawing]:
        """All figures, in order."""
        return [d for s in self.sections for d in (*s.figures, *(d for f in s.folds for d in f.figures))]

    def folded(self, drawing: Drawing) -> bool:
        """Whether a figure is shown only when it is asked for."""
        return any(drawing in fold.figures for section in self.sections for fold in section.folds)


def render(page: Page) -> str:
    """Write the page as HTML."""
    script = files("multiflora.reports").joinpath("page.js").read_text("utf-8")
    style = files("multiflora.reports").joinpath("page.css").read_text("utf-8")
    environment = Environment(
        loader=PackageLoader("multiflora.reports", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["drawn"] = _drawn
    environment.filters["data_url"] = lambda text: f"data:text/csv;charset=utf-8,{quote(text)}"
    return environment.get_template("page.html").render(
        page=page,
        style=Markup(style),
        script=Markup(script),
        # the browser runs this very script and no other, whatever a name in the page may try
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _drawn(drawing: Drawing) -> Markup:
    """A figure for the page, whose style sheet may lighten its colours by night.

    matplotlib has escaped the words in it, and plots.py those that it adds.
    """
    svg = drawing.svg
    for k, colour in enumerate(COLOURS):
        svg = svg.replace(f": {colour}", f": var(--colour-{k}, {colour})")
    return Markup(svg)


def fit(page: Page, limit: int = LIMIT) -> Page:
    """Leave the largest folded figures out of a page that would be too large; their files stay beside it."""
    size = len(render(page).encode())
    if size <= limit:
        return page
    folded = [d for section in page.sections for fold in section.folds for d in fold.figures]
    dropped: list[Drawing] = []
    for drawing in sorted(folded, key=lambda d: -len(d.svg)):
        if size <= limit:
            break
        dropped.append(drawing)
        size -= len(drawing.svg.encode())
    gone = {drawing.name for drawing in dropped}
    sections = [
        replace(
            section,
            folds=[replace(f, figures=[d for d in f.figures if d.name not in gone]) for f in section.folds],
        )
        for section in page.sections
    ]
    return replace(page, sections=sections, dropped=dropped)
