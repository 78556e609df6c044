"""``multiflora bench``: how fast the packed branches are on this machine, side by side with the alternatives."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from multiflora.cli.screen import log_on_stderr, print_json, stdout

__all__ = ["bench"]


class _Section(str, Enum):
    layer = "layer"
    heads = "heads"
    memory = "memory"
    shared = "shared"
    experts = "experts"
    step = "step"
    train = "train"
    generate = "generate"
    serve = "serve"


class _Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Few cases and rounds: a few minutes.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Every shape, type and dropout: more than an hour.")] = False,
    only: Annotated[
        list[_Section] | None, typer.Option("--only", help="Measure this part alone. May be repeated.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=1, help="Rounds of every case, instead of the preset's.")
    ] = None,
    threads: Annotated[
        int, typer.Option("--threads", min=1, help="On a processor. With one, other programs disturb least.")
    ] = 1,
    device: Annotated[
        _Device, typer.Option("--device", help="Where; auto: the GPU where there is one.")
    ] = _Device.auto,
    tasks: Annotated[
        Path | None,
        typer.Option(
            "--tasks",
            metavar="FOLDER",
            help="Train on sst2, trec, agnews and commonsenseqa in here; without it on four generated tasks.",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Results, JSON; saved after every case.")
    ] = Path("bench.json"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what the results file holds, measure the rest.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Measure nothing: judge the results in this file.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--page", metavar="FILE", help="Write a page with tables and figures, Markdown.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdicts as JSON instead of a table.")] = False,
) -> None:
    """Time the packed branches against the published loop, peft's LoRA and the frozen layer, and judge the targets."""
    from multiflora.bench.results import load
    from multiflora.errors import ConfigError

    if quick and full:
        raise ConfigError("--quick and --full are both given; choose one of the two, or neither for the middle way.")
    if report is not None and (quick or full or only or rounds or resume):
        raise ConfigError(
            "--report reads results and measures nothing, so --quick, --full, --only, --rounds and --resume do not go "
            "with it. Leave it out to measure, or leave those out to judge what was measured."
        )
    if report is not None:
        results = load(report)
    else:
        # torch's profiler tells of its every start on stderr, which would tear the bar; read when torch is imported
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        with log_on_stderr():
            from multiflora.bench.run import bench as run

            results = run(
                output,
                preset="quick" if quick else "full" if full else "standard",
                only=[section.value for section in only or ()],
                rounds=rounds,
                num_threads=threads,
                device=device.value,
                tasks=tasks,
                resume=resume,
                command=_command(quick=quick, full=full, tasks=tasks is not None, threads=threads),
            )
    from multiflora.bench.table import verdict_dicts, verdict_table

    if page is not None:
        from multiflora.bench.page import write_page

        write_page(results, page)
    if as_json:
        print_json({"verdicts": verdict_dicts(results)})
        return
    stdout.print(verdict_table(results))
    for what, where in (("Samples", report or output), ("Page", page)):
        if where is not None:
            stdout.print(f"{what} in {where}", markup=False, soft_wrap=True)


def _command(*, quick: bool, full: bool, tasks: bool, threads: int) -> str:
    """What to type for such results, wherever one's files are."""
    words = ["multiflora bench"]
    words += ["--quick"] * quick + ["--full"] * full + ["--tasks FOLDER"] * tasks
    return " ".join(words + ([f"--threads {threads}"] if threads != 1 else []))
