"""The command line. Each command builds a recipe, calls one library function and prints; Python does the same.

Nothing here imports torch: ``--help``, ``tasks``, ``methods``, ``init`` and a refused recipe answer at once.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from multiflora._version import __version__
from multiflora.cli.analyze import analyze
from multiflora.cli.bench import bench
from multiflora.cli.compare import compare
from multiflora.cli.compose import compose
from multiflora.cli.compress import compress
from multiflora.cli.convert import convert
from multiflora.cli.doctor import doctor
from multiflora.cli.errors import ErrorsInWords
from multiflora.cli.evaluate import evaluate
from multiflora.cli.expand import expand
from multiflora.cli.init import init
from multiflora.cli.merge import merge
from multiflora.cli.methods import methods_app
from multiflora.cli.report import report
from multiflora.cli.screen import stdout
from multiflora.cli.serve import serve
from multiflora.cli.tasks import tasks_app
from multiflora.cli.train import train

__all__ = ["app", "main"]


class _Group(TyperGroup):
    """Every command says its errors in words."""

    def invoke(self, ctx: Any) -> Any:
        with ErrorsInWords(debug=bool(ctx.params.get("debug"))):
            return super().invoke(ctx)


app = typer.Typer(
    name="multiflora",
    cls=_Group,
    help="Fine-tune one language model for many tasks at once with multi-branch LoRA.",
    no_args_is_help=True,
    add_completion=False,
    # a bug shows Python's own traceback; everything else has been said in words
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        stdout.print(f"multiflora {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """Fine-tune one language model for many tasks at once with multi-branch LoRA."""


app.command(rich_help_panel="The main job")(init)
app.command(rich_help_panel="The main job")(train)
app.command(rich_help_panel="The main job")(evaluate)
app.command(rich_help_panel="Which method earned its parameters")(compare)
app.command(rich_help_panel="Which method earned its parameters")(analyze)
app.command(rich_help_panel="Which method earned its parameters")(report)
app.command(rich_help_panel="Ship it")(convert)
app.command(rich_help_panel="Ship it")(merge)
app.command(rich_help_panel="Ship it")(serve)
app.command(rich_help_panel="Ship it")(expand)
app.command(rich_help_panel="Ship it")(compose)
app.command(rich_help_panel="Ship it")(compress)
app.add_typer(tasks_app, rich_help_panel="What there is")
app.add_typer(methods_app, rich_help_panel="What there is")
app.command(rich_help_panel="What there is")(bench)
app.command(rich_help_panel="What there is")(doctor)


def main() -> None:
    """Run the command line on ``sys.argv``.

    ``--debug`` may stand anywhere: whoever sees an error repeats the command and adds it at the end.
    """
    words = sys.argv[1:]
    if "--debug" in words:
        words = ["--debug", *(word for word in words if word != "--debug")]
    app(words, prog_name="multiflora")
