"""``multiflora report``: a run or a comparison as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from multiflora.cli.screen import log_on_stderr, stdout

__all__ = ["report"]


def report(
    target: Annotated[Path, typer.Argument(help="A run's or a comparison's output folder.", metavar="RUN")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="PAGE", help="Write this page instead of RUN/report.html."),
    ] = None,
    measure: Annotated[
        bool, typer.Option(help="Look inside adapters that 'analyze' has not measured yet (takes a while).")
    ] = True,
) -> None:
    """Write one page that needs no network: the answer, tables with intervals, figures, and how to do it again."""
    from multiflora.reports.run import report as run

    with log_on_stderr():
        written = run(target, output, measure=measure)
    stdout.print(written.answer, markup=False, soft_wrap=True)
    stdout.print(f"Saved {written.page}; figures and tables as files in {written.folder}", markup=False, soft_wrap=True)
