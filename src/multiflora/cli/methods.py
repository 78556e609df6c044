"""``multiflora methods``: what there is to train with. Read from a literal table, without torch."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

from multiflora.cli.screen import print_json, stdout
from multiflora.errors import ConfigError
from multiflora.methods import METHODS
from multiflora.suggest import did_you_mean
from multiflora.text_table import TextTable

__all__ = ["methods_app"]

methods_app = typer.Typer(name="methods", invoke_without_command=True)

_SHARED = "r, lora_alpha, target_modules and the rest of peft's words"


@methods_app.callback()
def list_methods(
    ctx: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the methods, or show one: `multiflora methods show rlora`."""
    if ctx.invoked_subcommand:
        return
    if as_json:
        print_json({card.name: asdict(card) for card in METHODS.values()})
        return
    table = TextTable()
    for heading in ("method", "arXiv", "merges"):
        table.add_column(heading, no_wrap=True)
    table.add_column("what it is, and its own settings")
    for card in METHODS.values():
        about = Text(card.line)
        if card.settings:
            about.append("\n" + ", ".join(card.settings), style="dim")
        # why one does not merge is told by `show`
        table.add_row(card.name, card.paper.removeprefix("arXiv "), card.merges.partition(" (")[0], about)
    stdout.print(table)


@methods_app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="A method's name, as `multiflora methods` lists it.", metavar="NAME")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Show one method with its settings."""
    if name not in METHODS:
        raise ConfigError(f"{name!r} is not a method; {did_you_mean(name, METHODS)}")
    card = METHODS[name]
    if as_json:
        print_json(asdict(card))
        return
    paper = f", {card.paper}" if card.paper.startswith("arXiv") else ""
    stdout.print(f"{card.title} ({card.name}){paper}", style="bold", markup=False)
    stdout.print(card.line, markup=False)
    facts = TextTable("", "", show_header=False)
    facts.add_row("in a recipe", f"method: {card.name}")
    if card.config:
        facts.add_row("in Python", f"multiflora.{card.config}(...)" if card.module else f"peft.{card.config}(...)")
    facts.add_row("its own settings", ", ".join(card.settings) or "none")
    if card.trains == "adapter":
        facts.add_row("shared settings", _SHARED)
        facts.add_row("experts of a mixture", card.experts)
    facts.add_row("learning rate", f"{card.learning_rate:g}, where a recipe gives none")
    facts.add_row("merges", card.merges)
    stdout.print(facts)
