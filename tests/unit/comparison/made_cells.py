"""Cells as a comparison leaves them, made up: what every method can do is known."""

from __future__ import annotations

from typing import Any

import numpy as np

from multiflora.comparison.plan import Competitor
from multiflora.comparison.spec import Comparison, load_comparison
from multiflora.comparison.tuning import Trial, Tuning, decide

TASKS = ("rg_chain_sum", "rg_spell_backward", "rg_number_filtering", "rg_calendar_arithmetic")
EXTRA = "rg_letter_counting"


def made_comparison(labels: list[str], seeds: int = 3) -> Comparison:
    return load_comparison(
        {
            "model": "embedded",
            "tasks": list(TASKS),
            "evaluate": {"extra_tasks": [EXTRA]},
            "output": "out",
            "compare": {
                "methods": [{"name": "lora", "label": label} for label in labels],
                "seeds": seeds,
                "baseline": labels[0],
            },
        }
    )


def made_competitors(labels: list[str]) -> list[Competitor]:
    return [
        Competitor(
            label=label, name="lora", settings={"r": 8}, train={}, parameters=1000, flops=None, rank=8, solved=False
        )
        for label in labels
    ]


def made_tunings(labels: list[str]) -> dict[str, Tuning]:
    """Every method tuned, at the learning rate of `made_cells`."""
    return {
        label: decide([Trial(1e-3 * 3**k, 0, 0.5 - 0.1 * k * k, 1.0 + k * k) for k in (-1, 0, 1)]) for label in labels
    }


def made_cells(
    generator: np.random.Generator,
    labels: list[str],
    *,
    seeds: int = 3,
    rows: int = 100,
    gains: dict[str, float] | None = None,
    luck: float = 0.1,
    own: float = 0.3,
    harness: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    """One cell of the base model, and one for each method and seed; tasks of the harness have rows, but no nats.

    A row is answered right with a probability that depends on its difficulty, on what the method makes of it, on the
    training's luck, and on the method's gain; its nats go with that.
    """
    difficulty = {task: generator.normal(0, 1.5, rows) for task in (*TASKS, EXTRA, *harness)}
    cells = [_cell("base", "base", 0, {task: -2 - hard for task, hard in difficulty.items()}, generator)]
    for label in labels:
        made_of_it = {task: generator.normal(0, own, rows) for task in difficulty}
        for seed in range(seeds):
            gain = (gains or {}).get(label, 0.0)
            logits = {
                task: 1 + gain - hard + made_of_it[task] + generator.normal(0, luck)
                for task, hard in difficulty.items()
            }
            cells.append(_cell("seed", label, seed, logits, generator))
    return cells


def _cell(
    kind: str, label: str, seed: int, logits: dict[str, np.ndarray], generator: np.random.Generator
) -> dict[str, Any]:
    rows, tasks = {}, {}
    for task, values in logits.items():
        right = (generator.normal(0, 1, len(values)) < values).astype(float)
        nll = np.log1p(np.exp(-(values + generator.normal(0, 0.3, len(values)))))
        rows[task] = {"id": [f"{task}-{i}" for i in range(len(values))], "score": right.tolist(), "nll": nll.tolist()}
        tasks[task] = {"score": right.mean(), "metric": "acc", "n": len(values), "nll": nll.mean()}
        if task.startswith("harness/"):
            tasks[task] |= {"group": "harness", "nll": None}
            rows[task]["nll"] = [None] * len(values)
    return {
        "cell": f"{label}-{kind}{seed}",
        "kind": kind,
        "label": label,
        "number": seed,
        "seed": seed,
        "method": "lora",
        "learning_rate": 1e-3,
        "scores": {"tasks": tasks, "macro": 0.5},
        "rows": rows,
        "log": [{"step": 10 * k, **{f"loss/{task}": 2.0 / k for task in TASKS}} for k in range(1, 5)],
        "seconds": {"train": 60.0 + seed},
        "peak_memory_bytes": 2**30,
        "latency": {"with": 11.0, "without": 10.0, "extra": 0.1},
        "device": "a CPU",
    }
