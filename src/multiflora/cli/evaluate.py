"""``multiflora evaluate``: score a run's adapter, or any model, on tasks."""

from __future__ import annotations

from typing import Annotated

import typer

from multiflora.cli.screen import log_on_stderr, print_json, stdout

__all__ = ["evaluate"]


def evaluate(
    target: Annotated[
        str, typer.Argument(help="A run's output folder, a model folder or a hub id.", metavar="RUN_OR_MODEL")
    ],
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", "-t", metavar="NAME", help="A task's name or file; several: a,b or repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Examples per task; all without it.")] = None,
    split: Annotated[
        str | None,
        typer.Option("--split", metavar="SPLIT", help="test or validation; else as the recipe says, or test."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=1, help="Examples scored at once; else as the recipe says, or 16."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Score a trained adapter, or any model, on tasks; a run's own tasks where none are named."""
    names = [name for word in tasks or [] for name in word.split(",") if name]
    with log_on_stderr():
        from multiflora.evaluation.run import evaluate as run
        from multiflora.evaluation.table import results_table

        results = run(target, tasks=names or None, limit=limit, split=split, batch_size=batch_size)
    if as_json:
        print_json(results)
    else:
        stdout.print(results_table(results))
