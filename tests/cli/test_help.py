"""What the command line offers, as a snapshot: a changed word or option is a change for users and shows in review."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from multiflora.cli import app

SNAPSHOT = Path(__file__).with_name("help.txt")


def test_help_is_as_recorded() -> None:
    now = "\n".join(_describe(typer.main.get_command(app), "multiflora")) + "\n"
    if os.environ.get("MULTIFLORA_RECORD"):
        SNAPSHOT.write_text(now, "utf-8")
    assert now == SNAPSHOT.read_text("utf-8"), "if this is meant: MULTIFLORA_RECORD=1 pytest tests/cli/test_help.py"


def test_every_command_explains_itself_and_its_options() -> None:
    for line in _describe(typer.main.get_command(app), "multiflora"):
        assert not line.endswith(": "), f"no help: {line}"


def _describe(command: Any, name: str) -> Iterator[str]:
    """One line for each command and option; not the boxes around them, which are typer's."""
    yield f"{name}: {' '.join((command.help or '').split())}"
    for param in command.params:
        if param.name != "help":
            words = ", ".join(param.opts) if param.param_type_name == "option" else param.name
            yield f"    {words}: {param.help or ''}"
    for sub in sorted(getattr(command, "commands", {})):
        yield from _describe(command.commands[sub], f"{name} {sub}")
