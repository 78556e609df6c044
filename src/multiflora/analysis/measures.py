"""Everything that is measured on one adapter, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multiflora.analysis.conflict import gradient_cosines, group_tasks, task_gradients
from multiflora.analysis.heads import head_cosine, head_norms, head_points
from multiflora.analysis.routing import LayerRouting, recording
from multiflora.analysis.spectrum import chance_similarity, measure, subspace_similarity
from multiflora.analysis.updates import Update, decompose, heads_of, place_of_layer
from multiflora.data.collate import pad_batch

__all__ = ["batches_of", "conflict", "heads", "routing", "similarity", "spectra"]

# singular values written down, and directions compared, per layer
_KEPT, _DIRECTIONS = 64, 8

Batches = Mapping[str, Sequence[Mapping[str, Any]]]


def spectra(updates: Mapping[str, Update]) -> dict[str, dict[str, Any]]:
    """Layer -> its place, its singular values and their measures."""
    found = {}
    for name, update in updates.items():
        _, singular, _ = decompose(update)
        number, module = place_of_layer(name)
        found[name] = {
            "layer": number,
            "module": module,
            "singular": singular[:_KEPT].tolist(),
            **measure(singular)._asdict(),
        }
    return found


def similarity(ours: Mapping[str, Update], other: Mapping[str, Update]) -> dict[str, Any]:
    """φ(i, j) between the updates of two adapters, over the layers both have; see `subspace_similarity`.

    As many directions are compared as every layer has in both, at most 8. ``phi`` is the mean over layers,
    ``by_layer`` has each one's φ of all these directions.
    """
    left = {}
    for name in ours:
        if name in other:
            (u, s, _), (v, t, _) = decompose(ours[name]), decompose(other[name])
            u, v = u[:, s > 0][:, :_DIRECTIONS], v[:, t > 0][:, :_DIRECTIONS]
            if u.shape[1] and v.shape[1]:  # an update that is zero has no direction
                left[name] = (u, v)
    if not left:
        return {"layers": 0, "phi": [], "chance": None, "by_layer": {}}
    count = min(vectors.shape[1] for pair in left.values() for vectors in pair)
    found = {name: subspace_similarity(u[:, :count], v[:, :count]) for name, (u, v) in left.items()}
    chance = fmean(chance_similarity(count, count, len(u)) for u, _ in left.values())
    by_layer = {}
    for name, phi in found.items():
        number, module = place_of_layer(name)
        by_layer[name] = {"layer": number, "module": module, "phi": float(phi[-1, -1])}
    mean = torch.stack(list(found.values())).mean(0)
    return {"layers": len(found), "phi": mean.tolist(), "chance": chance, "by_layer": by_layer}


def heads(model: Any) -> dict[str, Any]:
    """Cosine and norms of each layer's heads, and the heads of each module in the plane; empty for a single head."""
    found = {name: own for name, own in heads_of(model).items() if len(own) > 1}
    layers = {}
    for name, own in found.items():
        number, module = place_of_layer(name)
        layers[name] = {"layer": number, "module": module, "cosine": head_cosine(own), "norms": head_norms(own)}
    return {"layers": layers, "points": _points(found)} if layers else {}


def _points(found: Mapping[str, Tensor]) -> dict[str, list[dict[str, Any]]]:
    """Module -> its heads over all layers, laid out by t-SNE."""
    modules: dict[str, list[tuple[str, Tensor]]] = {}
    for name, own in found.items():
        modules.setdefault(place_of_layer(name)[1], []).append((name, own))
    layout: dict[str, list[dict[str, Any]]] = {}
    for module, layers in modules.items():
        placed = [(name, h, head) for name, own in layers for h, head in enumerate(own)]
        widest = max(head.shape[1] for _, _, head in placed)  # layers may differ in rank
        points = head_points([F.pad(head, (0, widest - head.shape[1])) for _, _, head in placed])
        if points is not None:
            layout[module] = [
                {"layer": place_of_layer(name)[0], "head": h, "x": float(x), "y": float(y)}
                for (name, h, _), (x, y) in zip(placed, points, strict=True)
            ]
    return layout


def routing(model: Any, batches: Batches) -> dict[str, LayerRouting]:
    """Run examples through the model and count its gates; empty for methods without a gate."""
    model.eval()
    with recording(model, len(batches)) as counter, torch.no_grad():
        if counter is None:
            return {}
        for own in batches.values():
            for batch in own:
                model(**{key: batch[key] for key in ("input_ids", "attention_mask", "task_id")}, use_cache=False)
        return counter.result()


def conflict(model: Any, batches: Batches) -> dict[str, Any]:
    """Cosines between the tasks' gradients on the adapter, and groups of tasks that agree."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if len(batches) < 2 or not trained:
        return {}
    cosines = gradient_cosines(task_gradients(model, batches))
    names = list(batches)
    return {"tasks": names, "cosine": cosines, "groups": group_tasks(names, cosines)}


def batches_of(examples: Sequence[Any], tasks: Sequence[str], device: Any, size: int = 4) -> dict[str, list[Any]]:
    """Task -> its examples as padded batches on a device.

    Args:
        examples: With ``ids``, ``labels`` and ``task``.
        tasks: Names, in the order of their numbers.
        device: Where the model is.
        size: Rows of a batch.
    """
    found: dict[str, list[Any]] = {task: [] for task in tasks}
    for number, task in enumerate(tasks):
        rows = [{"input_ids": e.ids, "labels": e.labels, "task_id": number} for e in examples if e.task == task]
        for start in range(0, len(rows), size):
            batch = pad_batch(rows[start : start + size], pad_token_id=0)
            found[task].append({key: value.to(device) for key, value in batch.items()})
    return {task: own for task, own in found.items() if own}
