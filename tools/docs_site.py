"""What Sphinx needs for our pages: equations as MathML, docstrings as written, and the tables of docs_tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from docs_tables import TABLES
from docutils import nodes
from docutils.statemachine import StringList
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

MATH = "mathml"

log = logging.getLogger(__name__)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register all of it."""
    app.add_html_math_renderer(MATH, (inline_math, None), (display_math, None))
    for name, (make, arguments) in TABLES.items():
        app.add_directive(name, directive(make, arguments))
    app.connect("autodoc-process-docstring", untyped_attribute, priority=400)  # before napoleon's, at 500
    app.connect("autodoc-process-signature", no_class_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


# ---- equations


def inline_math(self: Any, node: nodes.math) -> None:
    """Write an equation within a line."""
    self.body.append(mathml(node, block=False))
    raise nodes.SkipNode


def display_math(self: Any, node: nodes.math_block) -> None:
    """Write an equation of its own."""
    self.body.append(f'<div class="math">{mathml(node, block=True)}</div>\n')
    raise nodes.SkipNode


def mathml(node: nodes.Node, *, block: bool) -> str:
    """One equation; several lines are aligned at their ampersands."""
    tex = node.astext().strip()
    if "\\\\" in tex and r"\begin" not in tex:
        tex = rf"\begin{{aligned}}{tex}\end{{aligned}}"
    try:
        made = str(tex2mathml(tex, as_block=block))
    except (SyntaxError, AttributeError, IndexError, KeyError) as error:
        log.warning("equation %r cannot be written as MathML: %s", tex, error, location=node)
        return tex
    # without a font for mathematics a browser draws an accent into its letter: let it stand over it
    return made.replace('<mover accent="true">', "<mover>").replace('<mo stretchy="false">ˉ</mo>', "<mo>¯</mo>")


# ---- docstrings


def untyped_attribute(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep napoleon from taking what stands before a colon in an attribute's first line for its type."""
    if what == "attribute":
        lines.insert(0, "")


def no_class_signature(app: Sphinx, what: str, *rest: Any) -> tuple[str, str | None] | None:
    """Show no signature of a class: the fields that it would list have descriptions of their own."""
    return ("", None) if what == "class" else None


# ---- tables


def directive(make: Callable[..., Iterable[str]], arguments: int) -> type[SphinxDirective]:
    """A directive that puts the Markdown made by a function into the page."""

    class Made(SphinxDirective):
        required_arguments = arguments
        final_argument_whitespace = True

        def run(self) -> list[nodes.Node]:
            lines = list(make(*self.arguments))
            box = nodes.container()
            box.document = self.state.document
            source, _ = self.get_source_info()
            self.state.nested_parse(StringList(lines, source), self.content_offset, box)
            return box.children

    return Made
