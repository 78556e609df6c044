"""One cell: train, score, measure, and write it all down at once, so that a cell is either finished or not there."""

from __future__ import annotations

import json
import logging
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from multiflora.analysis.files import has_update
from multiflora.artifact import device_name, package_versions
from multiflora.comparison.plan import Cell
from multiflora.comparison.resources import latency, peak_memory, reset_peak_memory
from multiflora.errors import ConfigError, MultifloraError, TrainingError
from multiflora.evaluation.load import load_target
from multiflora.evaluation.run import evaluate
from multiflora.files import write_json
from multiflora.recipe import Recipe, load_recipe
from multiflora.training.checkpoint import CHECKPOINTS, last_checkpoint

__all__ = ["read_cell", "run_cell"]

log = logging.getLogger(__name__)


# a trial without a score; the search takes it for the worst there is
_DIVERGED: dict[str, Any] = {
    "scores": {"tasks": {}, "macro": None},
    "parameters": {},
    "log": [],
    "course": [],
    "seconds": {},
    "latency": None,
    "peak_memory_bytes": None,
    "rows": {},
}
_MEMORY = "peak_memory.json"  # of a run's training, which may be scored in another cell


def path_of(cell: Cell, folder: Path) -> Path:
    """The cell's file."""
    return folder / "cells" / f"{cell.name}.json"


def read_cell(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """Return a finished cell's numbers, or None if it has yet to run."""
    path = path_of(cell, folder)
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def run_cell(cell: Cell, folder: Path, *, quiet: bool = True) -> dict[str, Any]:
    """Run one cell and save its numbers.

    A training that was interrupted goes on from its last checkpoint (with ``train.save_every``), else it starts anew;
    one that had finished is not repeated.

    Args:
        cell: The cell.
        folder: The comparison's output folder.
        quiet: Show no progress on stderr.
    """
    found = read_cell(cell, folder)
    if found is not None:
        return found
    work = {"base": _score_base, "clock": _clock}.get(cell.kind, _train)
    found = work(cell, quiet=quiet) | {
        "cell": cell.name,
        "kind": cell.kind,
        "label": cell.label,
        "number": cell.number,
        "method": None if cell.kind == "base" else cell.recipe.method.name,
        "settings": {} if cell.kind == "base" else cell.recipe.method.settings,
        "seed": cell.recipe.seed,
        "learning_rate": cell.recipe.train.learning_rate,
        "split": cell.recipe.evaluate.split,
        "device": device_name(),
        "versions": package_versions(),
    }
    finite: dict[str, Any] = _finite(found)  # the same now as when it is read
    path = path_of(cell, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, finite)
    if cell.kind == "seed" and has_update(cell.recipe.method.name):
        look_inside(cell.recipe.output)
    return finite


def look_inside(run: Path) -> None:
    """Measure an adapter once, where it was trained, so that no report must load it again."""
    from multiflora.analysis.run import keep_measures, measure_run

    try:
        keep_measures(run, measure_run(run))
    except (MultifloraError, RuntimeError) as error:  # no memory left, say: the training stands all the same
        log.warning("%s was not looked into (%s); multiflora analyze does so.", run.name, error)


def _train(cell: Cell, *, quiet: bool) -> dict[str, Any]:
    """Train the cell's recipe unless that is done, score it as the cell asks, and time its forward pass."""
    output = cell.recipe.output
    try:
        _run(cell.training, quiet=quiet)
    except TrainingError:
        if cell.kind != "trial":
            raise
        return _DIVERGED  # what a search for a learning rate must find out, too
    results = json.loads((output / "results.json").read_text("utf-8"))
    run = json.loads((output / "run.json").read_text("utf-8"))
    memory = output / _MEMORY
    found = {
        "scores": results["adapted"],
        "parameters": results["parameters"],
        "log": results["training"].get("log", []),
        "course": results["training"].get("course", []),
        "seconds": run["seconds"],
        "latency": None,
        "peak_memory_bytes": json.loads(memory.read_text("utf-8")) if memory.is_file() else None,
    }
    as_scored = load_recipe(output / "recipe.yaml").evaluate == cell.recipe.evaluate
    if as_scored:
        found["rows"] = _rows(cell, output)
    if cell.kind == "seed" or not as_scored:
        loaded = load_target(output)
        if not as_scored:  # the run was a trial, or is one now
            found |= _scored(cell, loaded.model, loaded.tokenizer, quiet=quiet)
        if cell.kind == "seed":
            found["latency"] = latency(loaded.model)
    return found


def _run(recipe: Recipe, *, quiet: bool) -> list[dict[str, Any]]:
    """Train a recipe, go on with it, or leave it as it is if it is finished; returns the log of what was trained."""
    from multiflora.jobs.train import train

    output = recipe.output
    if (output / "README.md").is_file():  # the model card is what a run writes last
        return []
    resume = _is_resumable(recipe)
    if output.is_dir() and not resume:
        log.warning("%s was interrupted before its first checkpoint; it starts anew.", output.name)
        shutil.rmtree(output)
    watched = reset_peak_memory()
    history = train(recipe, resume=resume, quiet=quiet).log
    write_json(output / _MEMORY, peak_memory() if watched else None)
    return history


def _is_resumable(recipe: Recipe) -> bool:
    """Whether there is a checkpoint of this very recipe; a trial and a seed may differ in how they are scored."""
    written = recipe.output / CHECKPOINTS / "recipe.yaml"
    there = recipe.output.is_dir() and last_checkpoint(recipe.output) is not None
    return there and written.is_file() and load_recipe(written) == recipe


def _clock(cell: Cell, *, quiet: bool) -> dict[str, Any]:
    """Time the steps of a short training."""
    if cell.recipe.output.is_dir():
        shutil.rmtree(cell.recipe.output)  # timed as a whole, or not at all
    history = _run(cell.recipe, quiet=quiet)
    speeds = [line["tokens_per_second"] for line in history if "tokens_per_second" in line][1:]
    if not speeds:
        raise ConfigError(
            f"compare.budget is time, but {cell.label} trains in a way that cannot be timed step by step; set "
            "compare.budget to parameters or flops."
        )
    shutil.rmtree(cell.recipe.output)
    return {"speeds": speeds}


def _score_base(cell: Cell, *, quiet: bool) -> dict[str, Any]:
    """Score the model as it is before training."""
    from multiflora.evaluation.load import load_base
    from multiflora.training.precision import weights_of

    model, tokenizer = load_base(cell.recipe.model, weights_of(cell.recipe))
    watched = reset_peak_memory()
    found = _scored(cell, model, tokenizer, quiet=quiet)
    unmeasured: dict[str, Any] = {"parameters": {}, "log": [], "course": [], "seconds": {}, "latency": None}
    return found | unmeasured | {"peak_memory_bytes": peak_memory() if watched else None}


def _scored(cell: Cell, model: Any, tokenizer: Any, *, quiet: bool) -> dict[str, Any]:
    """Scores and rows of a model in memory, as the cell asks; nothing else is written."""
    wanted = cell.recipe.evaluate
    with tempfile.TemporaryDirectory() as folder:
        scores = evaluate(
            model,
            tokenizer,
            cell.recipe.tasks,
            split=wanted.split,
            limit=wanted.limit,
            batch_size=wanted.batch_size,
            max_new_tokens=wanted.max_new_tokens,
            extra_tasks=wanted.extra_tasks,
            harness_tasks=wanted.harness_tasks,
            chat_template=cell.recipe.model.chat_template,
            folder=Path(folder),
            progress=not quiet,
        )
        return {"scores": scores, "rows": _rows(cell, Path(folder))}


def _rows(cell: Cell, folder: Path) -> dict[str, dict[str, list[Any]]]:
    """Each task's examples: id, score and nats per token of the right completion, in the order of their ids."""
    found = {}
    scores = folder / "scores"
    files = {
        task.name: scores / f"{task.name}.jsonl" for task in (*cell.recipe.tasks, *cell.recipe.evaluate.extra_tasks)
    }
    # those of the harness, as far as their scores are means over examples
    files |= {f"harness/{unquote(path.stem)}": path for path in sorted((scores / "harness").glob("*.jsonl"))}
    for task, path in files.items():
        text = path.read_text("utf-8")
        rows = sorted((json.loads(line) for line in text.splitlines()), key=lambda row: str(row["id"]))
        found[task] = {key: [row[key] for row in rows] for key in ("id", "score", "nll")}
    return found


def _finite(value: Any) -> Any:
    """The same with None for what is no number: a training that diverged is a result, and JSON has no word for NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
