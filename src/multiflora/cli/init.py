"""``multiflora init``: a commented recipe to start from."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from multiflora.cli.screen import stdout
from multiflora.errors import ConfigError
from multiflora.files import user_path, write_text

__all__ = ["init"]


def init(
    path: Annotated[Path, typer.Argument(help="Where to write it.", metavar="[PATH]")] = Path("recipe.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is already there.")] = False,
) -> None:
    """Write a commented starter recipe."""
    path = user_path(path)
    if path.is_dir():
        path = path / "recipe.yaml"
    if path.exists() and not force:
        raise ConfigError(
            f"{path} exists already and was left as it is. Name another file, or add --force to replace it."
        )
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}. Create it first, or name another place.")
    write_text(path, files("multiflora.cli").joinpath("starter.yaml").read_text("utf-8"))
    stdout.print(f"Wrote {path}. Next: multiflora train {path} --dry-run", markup=False, soft_wrap=True)
