"""``multiflora convert``: an adapter as plain LoRA, dense model or llama.cpp adapter."""

from __future__ import annotations

import json
import shlex
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from multiflora.cli.screen import log_on_stderr, print_json, stdout
from multiflora.errors import ConfigError
from multiflora.files import beside

if TYPE_CHECKING:
    from multiflora.export import Report

__all__ = ["convert", "show"]


_AS_IS: dict[str, Any] = {"markup": False, "soft_wrap": True}
"""How lines are printed that may be copied."""


class Target(str, Enum):
    """What an adapter can become."""

    lora = "lora"
    dense = "dense"
    gguf = "gguf-lora"


def convert(
    adapter: Annotated[Path, typer.Argument(help="The folder an adapter was saved to.", metavar="ADAPTER")],
    to: Annotated[Target, typer.Option("--to", help="What it becomes.")] = Target.lora,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="Where it goes; ADAPTER-lora, say, without.")
    ] = None,
    task: Annotated[str | None, typer.Option("--task", metavar="TASK", help="Convert for this task only.")] = None,
    per_task: Annotated[
        bool, typer.Option("--per-task", help="Token-routed methods: one adapter for each task of the examples.")
    ] = False,
    per_expert: Annotated[
        bool,
        typer.Option("--per-expert", help="MOELoRA: one adapter for each expert, and the scales of each task's sum."),
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="Token-routed methods: examples to average the gate over; a file of rows, a recipe or a run's folder.",
        ),
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Minimise each layer's output error instead of averaging the gate.")
    ] = False,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Cut to this rank; tells the energy lost.")] = None,
    limit: Annotated[
        int, typer.Option("--limit", min=1, help="Calibration examples of a file, or of each task of a recipe.")
    ] = 64,
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="The base model, where the adapter does not name it.")
    ] = None,
    score: Annotated[
        bool, typer.Option("--score", help="Score the run's tasks before and after (plain LoRA of a run's folder).")
    ] = False,
    score_limit: Annotated[
        int | None, typer.Option("--score-limit", min=1, help="Examples scored of each task; all without it.")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Print every layer's numbers, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Turn an adapter into what other software loads, exactly where that can be, else with its error."""
    words: dict[str, Any] = {
        "task": task,
        "per_task": per_task,
        "per_expert": per_expert,
        "calibration": calibration,
        "fit": fit,
        "rank": rank,
        "limit": limit,
        "base": base,
    }
    target = output or beside(adapter, to.value)
    if score and to is not Target.lora:
        raise ConfigError(f"--score compares plain LoRA with the adapter; it cannot go with --to {to.value}.")
    if score and per_expert:
        raise ConfigError("--score scores adapters one by one, and an expert is no task's; leave --per-expert out.")
    with log_on_stderr():
        report = _convert(to, adapter, target, words)
        if score:
            from multiflora.export.score import with_scores

            report = with_scores(adapter, report, limit=score_limit)
    show(report, layers=layers, as_json=as_json)
    if to is Target.gguf and len(report.adapters) > 1 and not as_json:
        _show_server(report)


def _show_server(report: Report) -> None:
    from multiflora.export.gguf_lora import requests, server_options

    words = shlex.join(["llama-server", "-m", "BASE.gguf", *server_options(report)])
    stdout.print(f"One server for all tasks, started in {report.output}: {words}", **_AS_IS)
    for task, adapters in requests(report).items():
        stdout.print(f'A request for {task} says: "lora": {json.dumps(adapters)}', **_AS_IS)


def _convert(to: Target, adapter: Path, output: Path, words: dict[str, Any]) -> Report:
    if to is Target.dense:
        from multiflora.export.dense import merge

        return merge(adapter, output, **words)
    if to is Target.gguf:
        from multiflora.export.gguf_lora import to_gguf

        return to_gguf(adapter, output, **words)
    from multiflora.export import to_lora

    return to_lora(adapter, output, **words)


def show(report: Report, *, layers: bool, as_json: bool) -> None:
    """Print a conversion's report."""
    if as_json:
        print_json({"output": str(report.output), **report.to_dict()})
        return
    stdout.print(report.table())
    if report.scores:
        stdout.print(report.score_table())
    for made in report.adapters if layers else ():
        stdout.print(report.layer_table(made))
    if report.scales:
        stdout.print(report.scale_table())
    stdout.print(f"Written to {report.output} and read back.", **_AS_IS)
