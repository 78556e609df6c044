"""``multiflora expand``: a trained LoRA as the warm start of a multi-head adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from multiflora.cli.screen import log_on_stderr, stdout
from multiflora.errors import ConfigError
from multiflora.files import beside

__all__ = ["expand"]


def expand(
    lora: Annotated[Path, typer.Argument(help="The folder a plain LoRA was saved to.", metavar="LORA")],
    heads: Annotated[int, typer.Option("--heads", min=1, help="How many heads (MultiLoRA: modules).")] = 3,
    method: Annotated[
        str, typer.Option("--method", metavar="NAME", help="hydralora, rlora, mlora or multilora.")
    ] = "hydralora",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="Where it goes; LORA-METHOD without.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method: head_dropout=0.1. May be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of what is drawn at random.")] = 0,
) -> None:
    """Make a multi-head adapter with the outputs of a trained LoRA, to be trained on."""
    import yaml

    words: dict[str, Any] = {}
    for item in settings or []:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item!r} has no '='; expected KEY=VALUE, such as head_dropout=0.1.")
        words[key.strip()] = yaml.safe_load(value)
    target = output or beside(lora, method)
    with log_on_stderr():
        from multiflora.export.expand import expand as run

        written = run(lora, target, method=method, heads=heads, seed=seed, **words)
    stdout.print(f"Written to {written} and read back: same outputs as {lora}.", markup=False, soft_wrap=True)
