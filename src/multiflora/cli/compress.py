"""``multiflora compress``: a recipe in, a smaller model out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from multiflora.cli.screen import log_on_stderr, print_json, stdout

__all__ = ["compress"]


def compress(
    recipe: Annotated[Path, typer.Argument(help="Recipe file, YAML, whose method is losparse.", metavar="RECIPE")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one key: method.keep=0.1. May be repeated."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="Write here instead of the recipe's output.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Train with LoSparse, and say what came of it: size, speed and every score, before and after."""
    from multiflora.recipe import load_recipe

    words = list(overrides or [])
    if output is not None:
        words.append(f"output={json.dumps(str(output.absolute()))}")
    plan = load_recipe(recipe, words)
    with log_on_stderr():
        from multiflora.jobs.compress import compress as run

        found = run(plan)
    if as_json:
        print_json(found.to_dict())
        return
    stdout.print(found.table())
    for line in found.lines():
        stdout.print(line, markup=False, soft_wrap=True)
    stdout.print(f"Written to {found.output} and read back.", markup=False, soft_wrap=True)
