"""A recipe with a rate far above the usual ones: its comparison ends tuned, near the best rate, without a winner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import multiflora
from multiflora.comparison.cell import run_cell
from multiflora.comparison.plan import plan_of, seed_cell
from multiflora.comparison.spec import load_comparison

SHARED = Path(__file__).parents[3] / "shared"
TASKS = ("trec", "sst2", "commonsenseqa")
USUAL, OURS = 2e-4, 5e-3

pytestmark = [
    pytest.mark.whole,
    pytest.mark.skipif(not (SHARED / "models" / "tinylm-1m").is_dir(), reason="the shared model is not there"),
]


def plan(output: Path) -> dict[str, Any]:
    return {
        "model": str(SHARED / "models" / "tinylm-1m"),
        "tasks": [str(SHARED / "data" / "tasks" / task) for task in TASKS],
        "train": {"max_steps": 60, "batch_size": 16, "max_length": 96, "learning_rate": OURS},
        "evaluate": {"batch_size": 50},
        "output": str(output),
        "compare": {
            "methods": [{"lora": {"r": 8}}, "multilora", "rlora"],
            "seeds": 3,
            "learning_rate": {"trials": 3, "factor": 5},  # coarse: these rows cannot tell rates that lie closer
        },
    }


def test_it_ends_tuned_near_the_best_rate_and_names_no_winner(tmp_path: Path) -> None:
    comparison = load_comparison(plan(tmp_path / "compared"))
    summary = multiflora.compare(comparison, quiet=True)
    assert {row.verdict for row in summary.rows if row.label != "lora"} <= {"undecided", "no worse"}
    assert "did better" not in summary.answer
    assert "did worse" not in summary.answer
    planned = {item.label: item for item in plan_of(comparison)}
    for row in summary.rows:
        assert row.tuning is not None
        assert row.tuning.state == "tuned"
        rates = sorted({trial.rate for trial in row.tuning.tried if trial.score is not None})  # None: it diverged
        assert {USUAL, OURS} <= set(rates)
        assert row.tuning.tried[0].rate < row.tuning.chosen < row.tuning.tried[-1].rate
        # every rate's training with the first seed is there; scored on the test rows, which the choice has not seen
        cells = {
            rate: run_cell(seed_cell(comparison, planned[row.label], 0, rate), comparison.recipe.output)
            for rate in rates
        }
        chosen = cells[row.tuning.chosen]
        for rate, cell in cells.items():
            gains = [np.array(cell["rows"][task]["score"]) - np.array(chosen["rows"][task]["score"]) for task in TASKS]
            mean = np.mean([gain.mean() for gain in gains])
            error = np.sqrt(sum(gain.var(ddof=1) / len(gain) for gain in gains)) / len(gains)
            # paired over the rows and one-sided at 95 %: that it is better by more than one point is not shown
            assert mean - 1.645 * error <= 0.01, (row.label, rate, mean, error)
