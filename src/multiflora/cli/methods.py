"""``multiflora methods``: what there is to train with. Read from a literal table, without torch."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from multiflora.cli.screen import print_json, stdout
from multiflora.errors import ConfigError
from multiflora.methods import METHODS
from multiflora.suggest import did_you_mean

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
    table = Table("method", "what it is", "paper", "merges", box=None, pad_edge=False)
    for card in METHODS.values():
        table.add_row(card.name, card.line, card.paper, card.merges)
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
    stdout.print(f"{card.title} ({card.name}), {card.paper}", style="bold", markup=False)
    stdout.print(card.line, markup=False)
    facts = Table.grid(padding=(0, 2))
    facts.add_row("in a recipe", f"method: {card.name}")
    facts.add_row("in Python", f"multiflora.{card.config}(...)" if card.module else f"peft.{card.config}(...)")
    facts.add_row("its own settings", ", ".join(card.settings) or "none")
    facts.add_row("shared settings", _SHARED)
    facts.add_row("merges", card.merges)
    stdout.print(facts)
