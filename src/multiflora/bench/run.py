"""The benchmark: every case of a plan in one process, saved after each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from multiflora.bench.experts import measure_experts
from multiflora.bench.generate import measure_generate
from multiflora.bench.layers import measure_heads, measure_layer, measure_memory
from multiflora.bench.machine import has_compiler, machine
from multiflora.bench.plan import GENERATED_TASKS, TASKS, Job, Preset, Section, plan
from multiflora.bench.results import Machine, Results, load, save
from multiflora.bench.serve import measure_serve
from multiflora.bench.shared import measure_shared
from multiflora.bench.steps import measure_step
from multiflora.bench.timing import threads
from multiflora.bench.training import measure_training
from multiflora.errors import ConfigError

__all__ = ["bench"]

_MEASURES: dict[Section, tuple[str, Callable[..., Any]]] = {
    "layer": ("layers", measure_layer),
    "heads": ("heads", measure_heads),
    "memory": ("memory", measure_memory),
    "shared": ("shared", measure_shared),
    "experts": ("experts", measure_experts),
    "step": ("steps", measure_step),
    "train": ("training", measure_training),
    "generate": ("generate", measure_generate),
    "serve": ("serve", measure_serve),
}
"""Section -> its field in the results, and what measures one of its cases."""


def bench(
    path: Path,
    *,
    preset: Preset = "standard",
    only: Collection[Section] = (),
    rounds: int | None = None,
    num_threads: int = 1,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    tasks: Path | None = None,
    resume: bool = False,
    command: str = "multiflora bench",
    quiet: bool = False,
) -> Results:
    """Measure the cases of a preset and save the samples after each case, so that what is stopped can go on.

    Args:
        path: The results, JSON.
        preset: How much.
        only: These sections; empty: all.
        rounds: Rounds of every case that count; None: the preset's.
        num_threads: Threads torch computes with. With one, ratios are read from the process's own clock, which leaves
            out what the machine spends on others.
        device: Where; auto is the GPU where there is one.
        tasks: Folder with one folder each for sst2, trec, agnews and commonsenseqa; None: four generated tasks.
        resume: Keep the cases that ``path`` holds and measure the others.
        command: What the results say they were made by.
        quiet: Show no progress.

    Returns:
        All samples.

    Raises:
        ConfigError: There is no such device, ``cpu`` was asked for where a GPU is in view, a task is missing, or
            ``path`` is of another machine, version or command.
        DataError: ``resume``, and ``path`` is no result.

    Example:
        >>> bench(Path("bench.json"), preset="quick", only=["memory"]).memory[0].kept_bytes  # doctest: +SKIP
        {'frozen': 0, 'packed': ..., 'peft': ..., 'loop': ...}
    """
    where = _device(device)
    with threads(num_threads if where.type == "cpu" else None):
        here = machine(where)
        jobs = plan(
            preset,
            kind=here.kind,
            dtype="bfloat16" if here.native_bf16 else "float32",
            compiler=has_compiler(where),
            tasks=_tasks(tasks),
            only=only,
        )
        results = _started(path, here, command) if resume else Results(command=command, machine=here)
        jobs = [_shortened(job, rounds) for job in jobs if not _is_there(job, results)]
        save(results, path)
        with _bar(jobs, quiet=quiet) as report:
            for job in jobs:
                field, measure = _MEASURES[job.section]
                settings = {**job.settings, "device": where}
                if "dtype" in settings:
                    settings["dtype"] = getattr(torch, settings["dtype"])
                if "rounds" in settings:
                    settings["after_round"] = report(job)
                case = measure(**settings)
                results = results.model_copy(update={field: (*getattr(results, field), case)})
                save(results, path)
    return results


def _device(wanted: str) -> torch.device:
    available = torch.cuda.is_available()
    if wanted == "cpu" and available:
        # the training compared is the main job, which takes a GPU that it sees; so does the choice of the number type
        raise ConfigError(
            "--device is cpu, and torch sees a GPU here, which training would take. Hide it: set the environment "
            "variable CUDA_VISIBLE_DEVICES to nothing before the command."
        )
    if wanted == "cuda" and not available:
        raise ConfigError("--device is cuda, and torch sees no GPU here. Leave it out, or give --device cpu.")
    return torch.device("cuda" if wanted == "cuda" or (wanted == "auto" and available) else "cpu")


def _tasks(folder: Path | None) -> tuple[str, ...]:
    if folder is None:
        return GENERATED_TASKS
    found = [folder.absolute() / name for name in TASKS]
    missing = [path.name for path in found if not path.is_dir()]
    if missing:
        raise ConfigError(
            f"--tasks {folder} has no folder {', '.join(missing)}; it must hold {', '.join(TASKS)}, each with its "
            "train.jsonl. Give another folder, or leave the option out for four generated tasks."
        )
    return tuple(map(str, found))


def _started(path: Path, here: Machine, command: str) -> Results:
    """What there is, if it was measured on this machine with these versions and by the same command."""
    there = load(path)
    for what in ("device", "threads", "versions"):
        before, now = getattr(there.machine, what), getattr(here, what)
        if before != now:
            raise ConfigError(
                f"{path} was measured with {what} {before}, and here it is {now}; cases of both do not go into one "
                "table. Leave --resume out, or give another file with --output."
            )
    if there.command != command:
        raise ConfigError(
            f"{path} was measured by `{there.command}`, and this is `{command}`; a page names one command for all "
            "of its numbers. Give the same options (--only may differ), or another file with --output."
        )
    return there


def _is_there(job: Job, results: Results) -> bool:
    cases = getattr(results, _MEASURES[job.section][0])
    return any(all(getattr(case, key) == value for key, value in job.identity.items()) for case in cases)


def _shortened(job: Job, rounds: int | None) -> Job:
    if rounds is None or "rounds" not in job.settings:
        return job
    return job._replace(settings={**job.settings, "rounds": rounds})


@contextmanager
def _bar(jobs: Sequence[Job], *, quiet: bool) -> Iterator[Callable[[Job], Callable[[], None]]]:
    """A bar on stderr over the expected time of all jobs; yields what makes a job's ``after_round``."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as progress:
        bar = progress.add_task("", total=sum(job.cost for job in jobs))

        def report(job: Job) -> Callable[[], None]:
            number = 1 + next(i for i, other in enumerate(jobs) if other is job)
            words = [str(job.settings.get("shape", "")), job.settings.get("dtype", "")]
            if "dropout" in job.settings:
                words.append(f"dropout {job.settings['dropout']:g}")
            name = ", ".join(word for word in words if word)
            progress.update(bar, description=f"{number}/{len(jobs)} {job.section}  {name}")
            return lambda: progress.advance(bar, job.cost / job.ticks)

        yield report
