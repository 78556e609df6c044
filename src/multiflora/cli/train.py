"""``multiflora train``: a recipe in, an adapter and a table out."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from multiflora.cli.screen import log_on_stderr, print_json, stdout

if TYPE_CHECKING:
    from multiflora.recipe import Recipe

__all__ = ["train"]


def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe file, YAML. `multiflora init` writes one.", metavar="RECIPE")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one key: train.learning_rate=1e-4. May be repeated."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="Write here instead of the recipe's output.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be trained and what it would take; load no weights.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the output folder's last checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Train one adapter on all tasks of a recipe, and score every task before and after."""
    from multiflora.recipe import load_recipe

    words = list(overrides or [])
    if output is not None:
        words.append(f"output={json.dumps(str(output))}")
    plan = load_recipe(recipe, words)
    if dry_run:
        _print_estimate(plan, as_json)
        return
    with log_on_stderr():
        from multiflora.jobs.train import train as run
        from multiflora.training.processes import is_first_process

        if not is_first_process():  # of several side by side, one speaks for all
            logging.getLogger("multiflora").setLevel(logging.ERROR)
        result = run(plan, resume=resume)
    if not is_first_process():
        return
    if as_json:
        print_json({"output": str(result.output), **result.results})
    else:
        stdout.print(result.table())
        stdout.print(f"Saved in {result.output}", markup=False, soft_wrap=True)


def _print_estimate(plan: Recipe, as_json: bool) -> None:
    """Print the resolved recipe and what it would train and take."""
    with log_on_stderr():
        from multiflora.estimate import estimate

        numbers = estimate(plan)
    if as_json:
        print_json({"recipe": plan.model_dump(mode="json", exclude_none=True), **numbers.to_dict()})
    else:
        stdout.print(plan.to_yaml(), markup=False, soft_wrap=True)
        stdout.print(numbers.report())
