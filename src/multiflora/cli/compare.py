"""``multiflora compare``: several methods at one budget, several seeds, one honest table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from multiflora.cli.screen import log_on_stderr, print_json, stdout

if TYPE_CHECKING:
    from multiflora.comparison.results import Summary

__all__ = ["compare"]

CELLS_ENDING = ".json.gz"


def compare(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="A recipe with a section 'compare', YAML; or cells.json.gz, analysed anew.", metavar="RECIPE"
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one key: compare.seeds=5. May be repeated."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="Write here instead of the recipe's output.")
    ] = None,
    until: Annotated[
        Literal["decided"] | None,
        typer.Option("--until", help="Add seeds until every method has a verdict (compare.max_seeds bounds them)."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every method's rank and parameters; train nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Train methods at equal cost with several seeds, and say which earned its parameters. Start again to go on."""
    from multiflora.comparison.spec import load_comparison

    words = list(overrides or [])
    if output is not None:
        words.append(f"output={json.dumps(str(output.absolute()))}")
    if until is not None:
        words.append(f"compare.until={until}")
    if recipe.name.endswith(CELLS_ENDING):
        from multiflora.comparison.archive import analyse

        _print(analyse(recipe, words), as_json)
        return
    comparison = load_comparison(recipe, words)
    if dry_run:
        from multiflora.comparison.foresight import foresee
        from multiflora.comparison.plan import plan_of
        from multiflora.comparison.table import plan_dict, plan_table

        planned = plan_of(comparison)
        if as_json:
            print_json(plan_dict(planned))
        else:
            stdout.print(plan_table(planned, comparison))
            stdout.print(foresee(comparison, planned).told(), markup=False, soft_wrap=True)
        return

    from multiflora.comparison.run import compare as run

    with log_on_stderr():
        summary = run(comparison)
    _print(summary, as_json)
    if not as_json:
        stdout.print(f"Saved in {comparison.recipe.output}", markup=False, soft_wrap=True)


def _print(summary: Summary, as_json: bool) -> None:
    """The table, the answer and a sentence for each method."""
    if as_json:
        print_json(summary.to_dict())
        return
    stdout.print(summary.table())
    stdout.print()
    stdout.print(summary.answer, style="bold", markup=False, soft_wrap=True)
    for sentence in summary.sentences.values():
        stdout.print(f"- {sentence}", markup=False, soft_wrap=True)
