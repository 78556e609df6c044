"""Look inside a saved run: all that is measured of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from multiflora.analysis.files import FOLDER, MEASURES
from multiflora.analysis.measures import batches_of, conflict, heads, routing, similarity, spectra
from multiflora.analysis.routing import LayerRouting
from multiflora.analysis.updates import Update, adapter_updates, dense_updates
from multiflora.errors import ConfigError
from multiflora.evaluation.load import Loaded, load_base, load_target
from multiflora.export.examples import read_examples
from multiflora.files import check_inside, saving, write_json
from multiflora.methods import METHODS, merges
from multiflora.training.precision import weights_of

__all__ = ["EXAMPLES", "keep_measures", "measure_run"]

EXAMPLES = 16
"""Of each task, for routing and task conflict."""


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
        "notes": [
            *_notes(routed, recipe.method.name, merges(recipe.method.name, recipe.method.settings)),
            *_notes_on_experts(recipe.method.settings),
        ],
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


def _notes_on_experts(settings: Mapping[str, Any]) -> list[str]:
    """What is not measured of a mixture."""
    if not settings.get("target_parameters"):
        return []
    return ["Spectra and heads are those of linear layers alone; the branches of fused experts are left out."]


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
