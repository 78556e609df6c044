"""``multiflora doctor``: what is here, what is missing for which feature, and whether a recipe can run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from multiflora.cli.errors import BAD_INPUT
from multiflora.cli.screen import log_on_stderr, print_json, stdout

__all__ = ["doctor"]


def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe to check against this machine, YAML.", metavar="[RECIPE]")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one key: train.batch_size=4. May be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what is installed, what is missing for which feature, and whether a recipe can run on this machine."""
    from multiflora.doctor import diagnose

    with log_on_stderr():
        found = diagnose(recipe, overrides or ())
    if as_json:
        print_json(found.to_dict())
    else:
        stdout.print(found.report())
    if not found.can_run:
        raise typer.Exit(BAD_INPUT)
