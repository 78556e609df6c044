"""The study "when do many branches pay?": number of tasks x conflict x budget, eight methods, ten seeds.

    python tools/when.py DATA MODEL --output runs/when       # train what is missing; stop and start it as you like
    python tools/when.py DATA MODEL --output runs/when --page docs/results/when.md

DATA is a folder of the task TREC (question, choices, answer) as JSONL, MODEL a small causal language model. Each
condition is a comparison of `multiflora compare`: the first seed searches every method's learning rate, the other seeds
are trained with the rates that were found. Codes and rows are drawn anew for every seed. Each finished comparison is
packed into ``docs/results/when/``, so that anyone can do the analysis again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import multiflora
from when_data import NAMES, write_tasks

TASKS, CONFLICTS, BUDGETS = (2, 4, 8), (0.0, 0.5, 1.0), (8, 32)
SEEDS = tuple(range(10))
STEPS, BATCH = 300, 16


class Condition(NamedTuple):
    """One cell of the design."""

    tasks: int
    conflict: float
    rank: int
    """Of the plain LoRA that sets the budget."""

    @property
    def name(self) -> str:
        """In files."""
        return f"{self.tasks}-tasks-conflict-{self.conflict:g}-rank-{self.rank}"


def conditions() -> Iterator[Condition]:
    """All of them, the corners of the design first: what is stopped early has said the most."""
    every = [Condition(*each) for each in itertools.product(TASKS, CONFLICTS, BUDGETS)]
    corner = lambda each: (each.tasks in (2, 8)) + (each.conflict != 0.5)  # noqa: E731
    return iter(sorted(every, key=lambda each: (-corner(each), each.rank, -each.tasks, -each.conflict)))


def methods(each: Condition) -> list[dict[str, Any]]:
    """The competitors, each with as many heads as there are tasks; ranks are solved for equal parameters."""
    heads = each.tasks
    return [
        {"name": "lora", "r": each.rank},
        {"name": "multilora", "num_modules": heads},
        {"name": "rlora", "num_heads": heads},
        {"name": "hydralora", "num_heads": heads},
        {"name": "mlora", "num_heads": heads},
        {"name": "mtllora", "num_heads": heads},
        {"name": "moelora", "num_experts": heads},
    ]


def comparison(
    each: Condition, seed: int, base: Path, data: Path, output: Path, rates: dict[str, float] | None
) -> dict[str, Any]:
    """What `multiflora compare` is asked: with rates they are used, without they are searched."""
    entries = methods(each)
    if rates is not None:
        entries = [{**entry, "train": {"learning_rate": rates[entry["name"]]}} for entry in entries]
    section: dict[str, Any] = {
        "methods": entries,
        "seeds": [seed],
        "shared": {"target_modules": "all-linear"},
        "single_task": "together",
        "margin": 2.0,
    }
    if rates is None:
        section["learning_rate"] = {"trials": 4, "low": 1e-3, "factor": 3.2}
    return {
        "model": str(base),
        "tasks": [{"name": name, "source": str(data / name)} for name in NAMES[: each.tasks]],
        "train": {"max_steps": STEPS, "batch_size": BATCH, "max_length": 128, "loss": "tasks"},
        "evaluate": {"batch_size": 60, "during": [0.125, 0.25, 0.5]},
        "compare": section,
        "output": str(output),
    }
