"""Analyse a saved run, or every run of a comparison: measures as JSON, figures as SVG and PNG."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from multiflora.analysis.across import findings, own_drawings, shared_drawings
from multiflora.analysis.drawings import run_drawings
from multiflora.analysis.files import FOLDER, MEASURES, has_update, of_cell, read_measures
from multiflora.analysis.measures import batches_of, conflict, heads, routing, similarity, spectra
from multiflora.analysis.plots import Drawing, save_drawing
from multiflora.analysis.routing import LayerRouting
from multiflora.analysis.updates import Update, adapter_updates, dense_updates
from multiflora.compare.saved import COMPARISON, read_comparison
from multiflora.errors import ConfigError
from multiflora.evaluate.load import Loaded, load_base, load_target
from multiflora.export.examples import read_examples
from multiflora.files import check_inside, check_writable, saving, user_path, write_json
from multiflora.methods import METHODS, merges
from multiflora.train.precision import weights_of

__all__ = ["EXAMPLES", "Analysis", "analyze", "keep_measures", "measure_run"]

log = logging.getLogger(__name__)

EXAMPLES = 16
"""Of each task, for routing and task conflict."""


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What was found, and where it was written."""

    folder: Path
    measures: dict[str, Any]
    """What ``analysis.json`` holds."""
    drawings: tuple[Drawing, ...]
    findings: tuple[str, ...]
    """What can be said of it, a sentence each."""


def analyze(
    target: str | Path,
    *,
    against: str | Path | None = None,
    examples: int = EXAMPLES,
    folder: str | Path | None = None,
    draw: bool = True,
) -> Analysis:
    """Look inside a trained adapter, or all adapters of a comparison.

    Args:
        target: A run's output folder, or a comparison's.
        against: Another run, adapter or full fine-tuning, whose update directions are compared with this one's.
        examples: Training examples of each task that are run through the model for routing and task conflict.
        folder: Where to write; None: ``analysis`` within the target.
        draw: Draw the figures too.

    Raises:
        ConfigError: The folder holds no run and no comparison.
        AdapterError: The adapter adds nothing to weight matrices.

    Example:
        >>> multiflora.analyze("runs/rlora").findings  # doctest: +SKIP
    """
    source = user_path(target)
    place = user_path(folder) if folder is not None else source / FOLDER
    if folder is not None:
        check_writable(place)  # what follows takes minutes
    if (source / COMPARISON).is_file():
        if against is not None:
            raise ConfigError(
                f"{source} is a comparison, whose runs are compared with one another; leave out --against."
            )
        measures: dict[str, Any] = _measure_comparison(source, examples)
        found, drawings = findings(measures["runs"]), []
        if draw:
            own = own_drawings(measures["runs"])
            drawings = [*shared_drawings(measures["runs"]), *(d for drawn in own.values() for d in drawn)]
    else:
        measures = measure_run(source, examples=examples, against=None if against is None else user_path(against))
        found, drawings = [], run_drawings(measures) if draw else []
    if folder is None:
        check_inside(source, place)
    with saving(place):
        place.mkdir(parents=True, exist_ok=True)
    write_json(place / "analysis.json", measures)
    for drawing in drawings:
        save_drawing(drawing, place)
    return Analysis(folder=place, measures=measures, drawings=tuple(drawings), findings=tuple(found))


def measure_run(
    run: Path, *, examples: int = EXAMPLES, against: Path | None = None, loaded: Loaded | None = None
) -> dict[str, Any]:
    """Measure one run.

    Args:
        run: Its output folder.
        examples: Of each task, for routing and task conflict; 0: neither.
        against: Another run.
        loaded: The run, where it has been loaded already.
    """
    loaded = loaded or load_target(run)
    if loaded.recipe is None:
        raise ConfigError(f"{run} is no run of multiflora: recipe.yaml is missing. Give a run's output folder.")
    recipe, model = loaded.recipe, loaded.model
    tasks = [task.name for task in recipe.tasks]
    batches: dict[str, list[Any]] = {}
    if examples:
        read = read_examples(run, loaded.tokenizer, limit=examples, max_length=recipe.train.max_length)
        batches = batches_of(read, tasks, next(model.parameters()).device)
    routed = routing(model, batches) if batches else {}
    updates = _updates(loaded, routed)
    measures: dict[str, Any] = {
        "label": recipe.method.name,
        "examples": examples,
        "method": recipe.method.name,
        "title": METHODS[recipe.method.name].title,
        "tasks": tasks,
        "spectra": spectra(updates),
        "heads": heads(model) if hasattr(model, "get_base_model") else {},
        "routing": {name: {**asdict(layer), "dead": layer.dead} for name, layer in routed.items()},
        "notes": _notes(routed, recipe.method.name, merges(recipe.method.name, recipe.method.settings)),
    }
    if against is not None:
        measures["similarity"] = {"against": str(against), **similarity(updates, _updates(load_target(against), {}))}
    if batches and hasattr(model, "get_base_model"):
        model.set_adapter("default")  # loaded for inference, its weights would have no gradient
        measures["conflict"] = conflict(model, batches)
    return measures


def keep_measures(run: Path, measures: dict[str, Any]) -> dict[str, Any]:
    """Write a run's measures into its folder, and return them."""
    check_inside(run, run / FOLDER)
    with saving(run / FOLDER):
        (run / FOLDER).mkdir(exist_ok=True)
    write_json(run / MEASURES, measures)
    return measures


def _updates(loaded: Loaded, routed: Mapping[str, LayerRouting]) -> dict[str, Update]:
    """A run's updates: an adapter's, or those of trained weights against its base model."""
    if hasattr(loaded.model, "get_base_model"):
        gates = {name: torch.tensor(layer.load) for name, layer in routed.items()}
        return adapter_updates(loaded.model, gates)
    if loaded.recipe is None:
        raise ConfigError("Only a run of multiflora says which base model its weights were trained from.")
    base, _ = load_base(loaded.recipe.model, weights_of(loaded.recipe))
    return dense_updates(loaded.model, base)


def _notes(routed: Mapping[str, LayerRouting], method: str, how_it_merges: str) -> list[str]:
    """What a reader must know of how it was measured."""
    if how_it_merges.startswith("no"):
        how = "the mean gate over the examples" if routed else "equal weights"
        return [
            f"The update of {method} differs from token to token; its spectrum is that of the heads blended by {how}."
        ]
    if how_it_merges == "per task":
        return [f"{method} has one update for each task; the spectrum is that of their mean."]
    return []


def _measure_comparison(folder: Path, examples: int) -> dict[str, Any]:
    """Measure every finished run of a comparison; one that was measured with as many examples is read."""
    runs = []
    for cell in read_comparison(folder).cells():
        if not has_update(cell["method"]):
            continue
        run = folder / "runs" / cell["cell"]
        measures = read_measures(run)
        if measures.get("examples") != examples:
            log.info("Measuring %s", cell["cell"])
            measures = keep_measures(run, measure_run(run, examples=examples))
        runs.append(of_cell(measures, cell))
    if not runs:
        raise ConfigError(f"{folder} has no finished run with an update to analyse; finish the comparison first.")
    return {"runs": runs}
