"""``multiflora analyze``: look inside a trained adapter, or all adapters of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from multiflora.cli.screen import log_on_stderr, print_json, stdout

__all__ = ["analyze"]


def analyze(
    target: Annotated[Path, typer.Argument(help="A run's or a comparison's output folder.", metavar="RUN")],
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="RUN", help="Compare update directions with another run's."),
    ] = None,
    examples: Annotated[
        int, typer.Option("--examples", min=0, help="Of each task, for routing and task conflict; 0: neither.")
    ] = 16,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="Write here instead of RUN/analysis.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measures as JSON.")] = False,
) -> None:
    """Measure spectra, heads, routing and task conflict of what was trained; write JSON and figures (SVG, PNG)."""
    from multiflora.comparison.analyze import analyze as run

    with log_on_stderr():
        found = run(target, against=against, examples=examples, folder=output)
    if as_json:
        print_json(found.measures)
        return
    for drawing in found.drawings:
        stdout.print(f"{drawing.title}: {drawing.alt}", markup=False, soft_wrap=True)
    for sentence in found.findings:
        stdout.print(f"- {sentence}", markup=False, soft_wrap=True)
    stdout.print(f"Saved in {found.folder}", markup=False, soft_wrap=True)
