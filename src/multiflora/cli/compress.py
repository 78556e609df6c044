"""``multiflora compress``: a recipe in, a smaller model out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from multiflora.cli.screen import log_on_stderr, print_json, stdout

__all__ = ["compress"]


def compress(
    recipe: Annotated[
        Path, typer.Argument(help="Recipe with a section `compress` in place of `method`, YAML.", metavar="RECIPE")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one key: compress.keep=0.1. May be repeated."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="Write here instead of the recipe's output.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Fine-tune a model and make it smaller: a low-rank part and the most important rows of the rest (LoSparse)."""
    from multiflora.compress.spec import load_compression

    words = list(overrides or [])
    if output is not None:
        words.append(f"output={json.dumps(str(output.absolute()))}")
    plan = load_compression(recipe, words)
    with log_on_stderr():
        from multiflora.compress.run import compress as run

        found = run(plan)
    if as_json:
        print_json(found.to_dict())
        return
    stdout.print(found.table())
    for line in found.lines():
        stdout.print(line, markup=False, soft_wrap=True)
    stdout.print(f"Written to {found.output} and read back.", markup=False, soft_wrap=True)
