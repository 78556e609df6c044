"""One cell: train, score, measure, and write it all down at once, so that a cell is either finished or not there."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

from multiflora.analysis.files import has_update
from multiflora.artifact import device_name, package_versions
from multiflora.compare.plan import Cell
from multiflora.compare.resources import latency, peak_memory, reset_peak_memory
from multiflora.errors import MultifloraError, TrainingError
from multiflora.evaluate import evaluate
from multiflora.evaluate.load import load_target
from multiflora.files import write_json
from multiflora.train.checkpoint import last_checkpoint

__all__ = ["read_cell", "run_cell"]

log = logging.getLogger(__name__)


# a trial without a score; the search takes it for the worst there is
_DIVERGED: dict[str, Any] = {
    "scores": {"tasks": {}, "macro": None},
    "parameters": {},
    "log": [],
    "seconds": {},
    "latency": None,
}


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
    watched = reset_peak_memory()
    found = _score_base(cell, quiet=quiet) if cell.kind == "base" else _train(cell, quiet=quiet)
    found = found | {
        "cell": cell.name,
        "kind": cell.kind,
        "label": cell.label,
        "number": cell.number,
        "method": None if cell.kind == "base" else cell.recipe.method.name,
        "settings": {} if cell.kind == "base" else cell.recipe.method.settings,
        "seed": cell.recipe.seed,
        "learning_rate": cell.recipe.train.learning_rate,
        "split": cell.recipe.evaluate.split,
        "peak_memory_bytes": peak_memory() if watched else None,
        "rows": {} if found is _DIVERGED else _rows(cell),
        "device": device_name(),
        "versions": package_versions(),
    }
    path = path_of(cell, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, _finite(found))
    if cell.kind == "seed" and has_update(cell.recipe.method.name):
        look_inside(cell.recipe.output)
    return found


def look_inside(run: Path) -> None:
    """Measure an adapter once, where it was trained, so that no report must load it again."""
    from multiflora.analysis.run import keep_measures, measure_run

    try:
        keep_measures(run, measure_run(run))
    except (MultifloraError, RuntimeError) as error:  # no memory left, say: the training stands all the same
        log.warning("%s was not looked into (%s); multiflora analyze does so.", run.name, error)


def _train(cell: Cell, *, quiet: bool) -> dict[str, Any]:
    """Train the cell's recipe and time its forward pass."""
    from multiflora.train import train

    output = cell.recipe.output
    if not (output / "README.md").is_file():  # the model card is what a run writes last
        resume = output.is_dir() and last_checkpoint(output) is not None
        if output.is_dir() and not resume:
            log.warning("%s was interrupted before its first checkpoint; it starts anew.", cell.name)
            shutil.rmtree(output)
        try:
            train(cell.recipe, resume=resume, quiet=quiet)
        except TrainingError:
            if cell.kind != "trial":
                raise
            return _DIVERGED  # what a search for a learning rate must find out, too
    results = json.loads((output / "results.json").read_text("utf-8"))
    run = json.loads((output / "run.json").read_text("utf-8"))
    return {
        "scores": results["adapted"],
        "parameters": results["parameters"],
        "log": results["training"].get("log", []),
        "seconds": run["seconds"],
        "latency": latency(load_target(output).model),
    }


def _score_base(cell: Cell, *, quiet: bool) -> dict[str, Any]:
    """Score the model as it is before training."""
    from multiflora.evaluate.load import load_base
    from multiflora.train.precision import weights_of

    model, tokenizer = load_base(cell.recipe.model, weights_of(cell.recipe))
    wanted = cell.recipe.evaluate
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
        folder=cell.recipe.output,
        progress=not quiet,
    )
    return {"scores": scores, "parameters": {}, "log": [], "seconds": {}, "latency": None}


def _rows(cell: Cell) -> dict[str, dict[str, list[Any]]]:
    """Each task's examples: id, score and nats per token of the right completion, in the order of their ids."""
    found = {}
    for task in (*cell.recipe.tasks, *cell.recipe.evaluate.extra_tasks):
        text = (cell.recipe.output / "scores" / f"{task.name}.jsonl").read_text("utf-8")
        rows = sorted((json.loads(line) for line in text.splitlines()), key=lambda row: str(row["id"]))
        found[task.name] = {key: [row[key] for row in rows] for key in ("id", "score", "nll")}
    return found


def _finite(value: Any) -> Any:
    """The same with None for what is no number: a training that diverged is a result, and JSON has no word for NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
