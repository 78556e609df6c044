"""``multiflora merge``: the base model with the adapter inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from multiflora.cli.convert import show
from multiflora.cli.screen import log_on_stderr
from multiflora.files import beside

__all__ = ["merge"]


def merge(
    adapter: Annotated[Path, typer.Argument(help="The folder an adapter was saved to.", metavar="ADAPTER")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="Where it goes; ADAPTER-dense without.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", metavar="TASK", help="The task, for task-gated methods.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="The base model, where the adapter does not name it.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", metavar="FILE", help="Token-routed methods: examples to average the gate over."),
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Minimise each layer's output error instead of averaging the gate.")
    ] = False,
    shard_size: Annotated[str, typer.Option("--shard-size", metavar="SIZE", help="Largest file, such as 2GB.")] = "2GB",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Merge an adapter into its base model: one ordinary checkpoint with tokenizer and generation config."""
    target = output or beside(adapter, "dense")
    with log_on_stderr():
        from multiflora.export.dense import merge as run

        report = run(adapter, target, task=task, base=base, calibration=calibration, fit=fit, shard_size=shard_size)
    show(report, layers=False, as_json=as_json)
