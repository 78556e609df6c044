"""``multiflora evaluate``: score a run's adapter, any model, or several runs side by side, on tasks."""

from __future__ import annotations

from typing import Annotated

import typer

from multiflora.cli.screen import log_on_stderr, print_json, stdout

__all__ = ["evaluate"]


def evaluate(
    targets: Annotated[
        list[str],
        typer.Argument(
            help="A run's output folder, a model folder or a hub id; or several runs on one base model.",
            metavar="RUN_OR_MODEL...",
        ),
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
    """Score a trained adapter, any model, or runs side by side on tasks; the runs' own tasks where none are named."""
    names = [name for word in tasks or [] for name in word.split(",") if name] or None
    if len(targets) > 1:
        with log_on_stderr():
            from multiflora.evaluation.side_by_side import evaluate_side_by_side
            from multiflora.evaluation.table import side_by_side_table

            found = evaluate_side_by_side(targets, names, limit=limit, split=split, batch_size=batch_size)
        if as_json:
            print_json(found.to_dict())
        else:
            stdout.print(side_by_side_table(found.base, found.adapters))
        return
    with log_on_stderr():
        from multiflora.evaluation.run import evaluate as run
        from multiflora.evaluation.table import results_table

        results = run(targets[0], tasks=names, limit=limit, split=split, batch_size=batch_size)
    if as_json:
        print_json(results)
    else:
        stdout.print(results_table(results))
