"""A comparison's folder as ``multiflora compare`` and ``analyze`` leave it, made up within a second."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from multiflora.comparison.spec import COMPARISON, SUMMARY, Comparison, load_comparison
from multiflora.comparison.summary import summarise
from tests.unit.comparison.made_cells import EXTRA, TASKS, made_cells, made_comparison, made_competitors, made_tunings

METHODS = {"lora": "lora", "multilora": "multilora", "hydralora": "hydralora", "rlora": "rlora"}

PUBLISHED = {
    "title": "Averages & more",
    "source": "arXiv 0000.00000, Table 1",
    "columns": ["average", "sst2"],
    "rows": {"lora": [70.1, 90.0], "rlora": [71.2, None]},
}


def write_comparison(folder: Path, *, layers: int = 3, heads: int = 3, analysed: bool = True) -> Path:
    """Write a finished comparison of four methods, three seeds and four tasks, in which ``rlora`` is better."""
    labels = list(METHODS)
    cells = made_cells(
        np.random.default_rng(0), labels, rows=60, gains={"rlora": 1.2}, own=0.0, harness=("harness/lambada",)
    )
    for cell in cells:
        cell["method"] = METHODS.get(cell["label"])
        cell["versions"] = {"multiflora": "0.1.0"}
    comparison = _with_published(made_comparison(labels))
    summary = summarise(comparison, made_competitors(labels), cells, made_tunings(labels))
    (folder / "cells").mkdir(parents=True)
    for cell in cells:
        (folder / "cells" / f"{cell['cell']}.json").write_text(json.dumps(cell))
    (folder / COMPARISON).write_text(comparison.to_yaml(folder))
    (folder / SUMMARY).write_text(json.dumps(summary.to_dict()))
    if analysed:
        runs = [
            {**made_measures(cell["label"], layers, heads), "cell": cell["cell"], "seed": cell["seed"]}
            for cell in cells
            if cell["kind"] == "seed"
        ]
        (folder / "analysis").mkdir()
        (folder / "analysis" / "analysis.json").write_text(json.dumps({"runs": runs}))
    return folder


def _with_published(comparison: Comparison) -> Comparison:
    plain = {
        "model": "embedded",
        "tasks": list(TASKS),
        "evaluate": {"extra_tasks": [EXTRA]},
        "output": "out",
        "compare": {
            **comparison.compare.model_dump(exclude={"methods", "published", "budget"}),
            "methods": list(METHODS),
            "about": "Four methods & four tasks",
            "stated": ["four tasks"],
            "chosen": ["three seeds"],
            "published": [PUBLISHED],
        },
    }
    return load_comparison(plain)


def made_measures(label: str, layers: int = 3, heads: int = 3) -> dict[str, Any]:
    """What `multiflora.analysis.run.measure_run` gives for one run."""
    method = METHODS[label]
    names = {
        f"model.layers.{k}.self_attn.{module}": (k, module) for k in range(layers) for module in ("q_proj", "v_proj")
    }
    flat = 0.9 if method == "multilora" else 0.6
    routed = method in ("hydralora", "rlora")
    cosine = 0.9 if method == "hydralora" else 0.2
    return {
        "label": label,
        "method": method,
        "title": label,
        "tasks": list(TASKS),
        "spectra": {name: _spectrum(*place, flat) for name, place in names.items()},
        "heads": {}
        if method == "lora"
        else {
            "layers": {
                name: {"layer": k, "module": module, "cosine": cosine, "norms": [1.0 + h for h in range(heads)]}
                for name, (k, module) in names.items()
            },
            "points": {
                module: [{"layer": k, "head": h, "x": k + h, "y": k - h} for k in range(layers) for h in range(heads)]
                for module in ("q_proj", "v_proj")
            },
        },
        "routing": {
            name: {
                "load": [0.01, *[0.99 / (heads - 1)] * (heads - 1)],
                "by_task": [[1 / heads] * heads for _ in TASKS],
                "entropy": 0.8,
                "dead": [0],
            }
            for name in names
        }
        if routed
        else {},
        "conflict": {
            "tasks": list(TASKS),
            "cosine": [[1.0 if a == b else -0.1 for b in TASKS] for a in TASKS],
            "groups": [[task] for task in TASKS],
        },
        "notes": [f"The update of {method} differs from token to token."] if routed else [],
    }


def _spectrum(layer: int, module: str, flat: float) -> Mapping[str, Any]:
    values = [flat**k for k in range(8)]
    norm = math.sqrt(sum(v * v for v in values))
    return {
        "layer": layer,
        "module": module,
        "singular": values,
        "norm": norm,
        "top_share": 1 / norm**2,
        "entropy": flat,
        "effective_rank": 8 * flat,
        "stable_rank": norm**2,
    }
